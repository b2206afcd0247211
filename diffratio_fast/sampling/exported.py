"""Export of a generator for other software: torch.export and ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffratio_fast.data.scaling import Scaling
from diffratio_fast.errors import UserError
from diffratio_fast.storage.writing import replace_file

LARGEST_BATCH = 4096
CHECKED = (1, 5)
"""Batch sizes at which an exported program is compared with PyTorch; neither is the traced one."""
TRACED = 2
PIXEL_TOLERANCE = 1
"""Gray levels by which ONNX Runtime may differ, because of rounding."""
LATENT_TOLERANCE = 1e-3


class Program(nn.Module):
    """Maps latents float32 [N, *latent_shape] and labels int64 [N] to images uint8 [N, C, H, W].

    If the generator produces VAE latents, the result is float32 [N, c, h, w], unscaled: the input of the VAE.
    """

    def __init__(self, generator: nn.Module, scaling: Scaling) -> None:
        super().__init__()
        self.generator = generator
        mean, std = (
            torch.tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (scaling.mean, scaling.std)
        )
        self.register_buffer("mean", mean)
        self.register_buffer("factor", 2 * std)  # x0 has the standard deviation 0.5
        self.low, self.high = scaling.low, scaling.high

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        records = self.generator(latents, labels) * self.factor + self.mean
        if self.low is None or self.high is None:
            return records
        unit = (records.clamp(self.low, self.high) - self.low) / (self.high - self.low)
        return (unit * 255).round().to(torch.uint8)


def example(generator: nn.Module, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """Example inputs of a program: fixed standard normal latents and cyclic labels."""
    shape: tuple[int, ...] = generator.latent_shape  # type: ignore[assignment]
    noise = torch.Generator().manual_seed(count)
    return torch.randn(count, *shape, generator=noise), torch.arange(count) % classes


def trace(program: Program, classes: int) -> torch.export.ExportedProgram:
    """Export the program with ``torch.export``, for any batch size up to ``LARGEST_BATCH``."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    inputs = example(program.generator, TRACED, classes)
    with _quiet():
        return torch.export.export(program, inputs, dynamic_shapes=({0: batch}, {0: batch}))


def write_torch(program: Program, classes: int, path: Path) -> float:
    """Write a ``.pt2`` file; return the largest difference from PyTorch on new inputs (0 expected)."""
    traced = trace(program, classes)
    buffer = io.BytesIO()
    torch.export.save(traced, buffer)
    replace_file(path, buffer.getvalue())
    loaded = torch.export.load(path).module()
    return _check(program, classes, lambda *inputs: loaded(*inputs), path)


def write_onnx(program: Program, classes: int, path: Path) -> float | None:
    """Write an ``.onnx`` file; return ONNX Runtime's largest difference (None if not installed)."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx needs {error.name}, which is not installed; pip install diffratio-fast[onnx]"
        ) from None
    inputs = example(program.generator, TRACED, classes)
    with _quiet():
        exported = torch.onnx.export(
            trace(program, classes), inputs, dynamo=True, verbose=False,
            input_names=["latents", "labels"], output_names=["images"],
        )  # fmt: skip
    assert exported is not None
    buffer = io.BytesIO()
    onnx.save_model(exported.model_proto, buffer)
    replace_file(path, buffer.getvalue())
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(latents: Tensor, labels: Tensor) -> Tensor:
        (images,) = session.run(None, {"latents": latents.numpy(), "labels": labels.numpy()})
        return torch.from_numpy(images)

    return _check(program, classes, run, path)


def _check(program: Program, classes: int, other: Any, path: Path) -> float:
    largest = 0.0
    limit = LATENT_TOLERANCE if program.low is None else PIXEL_TOLERANCE
    for count in CHECKED:
        inputs = example(program.generator, count, classes)
        with torch.no_grad():
            expected, found = program(*inputs), other(*inputs)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise UserError(
                f"{path}: gives {found.dtype} {list(found.shape)}; expected {list(expected.shape)}"
            )
        difference = float(np.abs(found.double().numpy() - expected.double().numpy()).max())
        largest = max(largest, difference)
    if not largest <= limit:
        raise UserError(f"{path}: differs from PyTorch by {largest:.3g}, more than {limit:g}; do not use it")
    return largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of the exporters about optional packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
