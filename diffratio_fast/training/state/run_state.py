"""The state of a training run.

A step is a pure function of (state, step): all random numbers are Philox draws, so the state consists of the
networks, their average, the optimizers and a few running sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffratio_fast.config.run import RunConfig
from diffratio_fast.training.processes.world import is_sharded


@dataclass
class RunState:
    """Base class of the state of a run: names of its parts, and counters after ``step`` steps."""

    NETWORKS: ClassVar[tuple[str, ...]]
    OPTIMIZERS: ClassVar[tuple[str, ...]]
    TENSORS: ClassVar[tuple[str, ...]]
    """Names of attributes; a network that is None is not saved."""

    sums: Tensor = field(kw_only=True)
    statistics: Tensor = field(kw_only=True)
    bad_steps: Tensor = field(kw_only=True)
    step: int = field(default=0, kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)
    best: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def networks(self) -> list[str]:
        """Names of the networks in the state."""
        return [name for name in self.NETWORKS if getattr(self, name) is not None]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state under a unique name."""
        for part in self.networks():
            for name, tensor in getattr(self, part).state_dict().items():
                yield f"{part}.{name}", tensor
        for part in self.OPTIMIZERS:
            optimizer = getattr(self, part)
            for number, values in optimizer.state_dict()["state"].items():
                for name, tensor in values.items():
                    yield f"{part}.{number}.{name}", torch.as_tensor(tensor)
            if "step" in optimizer.param_groups[0]:  # apex counts there
                yield f"{part}.step", torch.as_tensor(optimizer.param_groups[0]["step"])
        for part in self.TENSORS:
            yield part, getattr(self, part)

    @property
    def sharded(self) -> bool:
        """Whether any network is sharded over the processes."""
        return any(is_sharded(p) for name in self.networks() for p in getattr(self, name).parameters())

    def blank(self, sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Empty tensors of these shapes and dtypes, for reading a checkpoint before ``restore``."""
        tensors: dict[str, Tensor] = {}
        for part in self.networks():
            for name, tensor in getattr(self, part).state_dict().items():
                tensors[f"{part}.{name}"] = tensor
        for part in self.OPTIMIZERS:
            parameters = [p for group in getattr(self, part).param_groups for p in group["params"]]
            for name, (size, dtype) in sizes.items():
                owner, _, rest = name.partition(".")
                if owner != part:
                    continue
                number = rest.partition(".")[0]
                like = parameters[int(number)] if number != "step" else parameters[0]
                tensors[name] = (
                    torch.zeros_like(like)
                    if size and size == tuple(like.shape)
                    else torch.zeros(size, dtype=dtype, device=like.device)
                )
        return tensors | {part: getattr(self, part) for part in self.TENSORS}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of a checkpoint; raises Key-, Runtime- or ``ValueError`` if they do not match."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        for part in self.networks():
            getattr(self, part).load_state_dict(parts[part])
        for part in self.OPTIMIZERS:
            optimizer = getattr(self, part)
            values: dict[int, dict[str, Tensor]] = {}
            groups = optimizer.state_dict()["param_groups"]
            for name, tensor in parts.get(part, {}).items():
                number, _, key = name.partition(".")
                if number == "step":
                    groups = [group | {"step": int(tensor)} for group in groups]
                else:
                    values.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({"state": values, "param_groups": groups})
        for part in self.TENSORS:
            getattr(self, part).copy_(parts[part][""])


def run_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of weights and images; bfloat16 uses autocast."""
    return torch.float64 if config.precision == "float64" else torch.float32


def place(config: RunConfig, network: nn.Module, device: torch.device) -> None:
    """Move a network to the configured device, dtype and memory format, in place."""
    network.to(device, run_dtype(config))
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
