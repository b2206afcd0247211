"""The project's operations by its own launchers (runtime/launchers.cpp), on the simulated device."""

from __future__ import annotations

import ctypes as C
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from ptx.simulator import CODES, Buffer, Memory, Pointer, Simulator
from torch import Tensor


class Pass(IntEnum):
    FORWARD = 0
    IMAGE = 1
    WEIGHTS = 2


class Objective(IntEnum):
    NONE = 0
    GIVEN = 1
    SCORE = 2
    LOGISTIC = 3


class Form(IntEnum):
    AUTOMATIC = 0
    ONE_LAUNCH = 1
    SEVERAL = 2


Sizes = C.c_int64 * 8
"""channels, height, width and patch of images; tokens, C, depth, hidden units."""
PLAN = ("blocks", "threads", "shared", "product_blocks", "slice", "splits", "one_launch", "unused")


class MixerArguments(C.Structure):
    """``MixerArguments`` of runtime/launchers.cpp."""

    _fields_ = [
        ("sizes", Sizes),
        ("packed", Pointer),
        ("sigma_data", C.c_float),
        *((name, C.c_int) for name in ("batch", "draws", "halves", "type")),
        ("images", Pointer * 2),
        ("sigma", Pointer),
        ("conditioning", Pointer * 2),
        ("rng", Pointer),
        ("index", Pointer),
        ("streams", C.c_uint32 * 2),
        *((name, C.c_int) for name in ("objective", "divergence", "pass_", "form", "out_type")),
        *((name, Pointer) for name in ("upstream", "log_ratio", "image")),
        ("conditioning_gradient", Pointer * 2),
        ("out", Pointer * 7),
        ("loss", Pointer),
        ("workspace_limit", C.c_int64),
        ("slice_units", C.c_int64),
        ("kept", Pointer),
        ("kept_bytes", C.c_int64),
        *((name, C.c_int) for name in PLAN),
        ("workspace_bytes", C.c_int64),
        ("unit_bytes", C.c_int64),
        ("staging", C.c_int64 * 10),
        ("padded", C.c_int * 4),
    ]


STAGED = ["m", "h", "g", "gm", "a", "gu", "last", "first", "z", "rows"]


def prepare(simulator: Simulator) -> None:
    """Types of the launchers' arguments."""
    library = simulator.library
    library.launch_stream_word.restype = C.c_uint32
    library.launch_stream_word.argtypes = [C.c_int64] * 3
    library.launch_packed_bytes.restype = library.launch_mixer_arguments_bytes.restype = C.c_int64
    number, pointers = C.c_int64, [Pointer] * 5
    library.launch_add_noise.argtypes = [
        Pointer, Pointer, number, number, C.c_int, *pointers, C.c_int, C.c_int
    ]  # fmt: skip
    library.launch_random_words.argtypes = [Pointer, Pointer, number, number, C.c_uint32, Pointer]
    assert library.launch_mixer_arguments_bytes() == C.sizeof(MixerArguments), "operations.py: another layout"


def stream_words(simulator: Simulator, purposes: tuple[int, ...], substep: int, draw: int = 0) -> Any:
    words = [simulator.library.launch_stream_word(p, substep, draw) for p in purposes]
    return (C.c_uint32 * len(words))(*words)


def add_noise(
    simulator: Simulator, x0: list[Tensor], sigma: Tensor, rng: Tensor, index: Tensor,
    purposes: tuple[int, ...],
    substep: int, draw: int, scale: Tensor | None, dtype: torch.dtype, offset: int = 0,
) -> Tensor:  # fmt: skip
    """``ops.add_noise``; with ``offset`` images and result begin at that many elements of their buffers."""
    batch, size = x0[0].shape
    with Memory(simulator) as memory:

        def shifted(x: Tensor, name: str) -> int:
            flat = torch.cat([torch.zeros(offset, dtype=x.dtype), x.reshape(-1)])
            return memory.of(flat, name).pointer + offset * x.element_size()

        images = (Pointer * len(x0))(*[shifted(x, f"images {n}") for n, x in enumerate(x0)])
        out = memory.empty((len(x0) * batch * size + offset,), dtype, "out")
        item = torch.empty((), dtype=dtype).element_size()
        simulator.check(
            simulator.library.launch_add_noise(
                memory.of(rng, "rng").pointer, memory.of(index, "index").pointer, batch, size, len(x0),
                stream_words(simulator, purposes, substep, draw), images, memory.of(sigma, "sigma").pointer,
                None if scale is None else memory.of(scale, "scale").pointer, out.pointer + offset * item,
                CODES[x0[0].dtype], CODES[dtype],
            )
        )  # fmt: skip
        missing = simulator.library.simulator_count_invalid(
            out.pointer + offset * item, out.bytes - offset * item
        )
        assert not missing, f"{missing} bytes of the result were not written"
        return out.raw()[offset:].reshape(len(x0) * batch, size)


def normal(
    simulator: Simulator, rng: Tensor, index: Tensor, size: int, purpose: int, substep: int, draw: int
) -> Tensor:
    with Memory(simulator) as memory:
        out = memory.empty((len(index), size), torch.float32, "out")
        streams = stream_words(simulator, (purpose,), substep, draw)
        simulator.check(
            simulator.library.launch_add_noise(
                memory.of(rng, "rng").pointer, memory.of(index, "index").pointer, len(index), size, 1,
                streams,
                None, None, None, out.pointer, 0, 0,
            )
        )  # fmt: skip
        return out.tensor()


def random_words(
    simulator: Simulator, rng: Tensor, index: Tensor, count: int, purpose: int, substep: int, draw: int
) -> Tensor:
    with Memory(simulator) as memory:
        out = memory.empty((len(index), count), torch.int64, "out")
        (word,) = stream_words(simulator, (purpose,), substep, draw)
        places = memory.of(rng, "rng").pointer, memory.of(index, "index").pointer
        simulator.check(simulator.library.launch_random_words(*places, len(index), count, word, out.pointer))
        return out.tensor()


def sizes_of(weights: list[Tensor], image_shape: tuple[int, ...]) -> Any:
    channels, height, width = image_shape
    c, vector = weights[0].shape
    depth, hidden, _ = weights[4].shape
    return Sizes(
        channels, height, width, round((vector / channels) ** 0.5), weights[1].shape[0], c, depth, hidden
    )


def pack_weights(simulator: Simulator, weights: list[Tensor], image_shape: tuple[int, ...]) -> Tensor:
    sizes = sizes_of(weights, image_shape)
    with Memory(simulator) as memory:
        size = simulator.library.launch_packed_bytes(C.byref(sizes))
        out = memory.empty((size,), torch.uint8, "packed")
        places = (Pointer * 7)(*[memory.of(w, f"weight {i}").pointer for i, w in enumerate(weights)])
        code = CODES[weights[0].dtype]
        simulator.check(
            simulator.library.launch_pack_weights(C.byref(sizes), code, places, Pointer(out.pointer))
        )
        return out.tensor()


@dataclass
class Outcome:
    """The results of a call, by name; its plan; with ``keep`` the staged operands."""

    results: dict[str, Tensor]
    arguments: MixerArguments
    kept: Tensor

    @property
    def launch(self) -> str:
        a = self.arguments
        form = ", cooperative" if a.one_launch else f", {a.splits} splits" if a.splits > 1 else ""
        return f"{a.blocks} x {a.threads}{form}"

    def staged_at(self, name: str) -> int:
        return int(self.arguments.staging[STAGED.index(name)])


def mixer(
    simulator: Simulator,
    weights: list[Tensor],
    images: list[Tensor],
    sigma: Tensor,
    conditioning: list[Tensor],
    *,
    pass_: Pass,
    objective: Objective,
    packed: Tensor,
    noise: tuple[Tensor, Tensor, tuple[int, ...], int] | None = None,
    upstream: Tensor | None = None,
    divergence: int = 0,
    form: Form = Form.SEVERAL,
    slice_units: int = 0,
    want_image: bool = False,
    keep: int = 0,
) -> Outcome:
    """One call of the launchers on lists of halves. ``noise``: rng, index, purposes, substep.

    ``slice_units``: units for which there is workspace. ``keep``: bytes of staged operands to copy.
    """
    batch, draws = images[0].shape[0], sigma.shape[1] if sigma.dim() == 2 else 1
    a = MixerArguments(
        sizes=sizes_of(weights, tuple(images[0].shape[1:])), sigma_data=0.5, batch=batch, draws=draws,
        halves=len(images), type=CODES[images[0].dtype], objective=objective, divergence=divergence,
        pass_=pass_, form=form, out_type=CODES[weights[0].dtype], workspace_limit=256 << 20,
        slice_units=slice_units,
    )  # fmt: skip
    found: dict[str, Buffer] = {}
    with Memory(simulator) as memory:

        def result(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
            found[name] = memory.empty(shape, dtype, name)
            return found[name].pointer

        a.packed = memory.of(packed, "packed").pointer
        a.sigma = memory.of(sigma.float(), "sigma").pointer
        for half, x in enumerate(images):
            a.images[half] = memory.of(x, f"images {half}").pointer
            e = conditioning[half].float()
            a.conditioning[half] = memory.of(e, f"conditioning {half}").pointer
            if pass_ is Pass.WEIGHTS:
                a.conditioning_gradient[half] = result(f"conditioning {half}", tuple(e.shape))
        if noise is not None:
            rng, index, purposes, substep = noise
            a.rng, a.index = memory.of(rng, "rng").pointer, memory.of(index, "index").pointer
            for half, word in enumerate(stream_words(simulator, purposes[: len(images)], substep)):
                a.streams[half] = word
        if upstream is not None:
            a.upstream = memory.of(upstream.float(), "upstream").pointer
        a.log_ratio = result("log_ratio", (len(images) * batch * draws,))
        if want_image or pass_ is Pass.IMAGE:
            a.image = result("image", tuple(images[0].shape))
        if pass_ is Pass.WEIGHTS:
            for i, w in enumerate(weights):
                a.out[i] = result(f"weight {i}", tuple(w.shape), w.dtype)
            if objective is Objective.LOGISTIC:
                a.loss = result("loss", (1,))
        kept = torch.zeros(max(keep, 1), dtype=torch.uint8)
        a.kept, a.kept_bytes = kept.data_ptr(), keep
        simulator.check(simulator.library.launch_mixer(C.byref(a)))
        return Outcome({name: buffer.tensor() for name, buffer in found.items()}, a, kept)
