"""Problems of the ratio operations, and their expected results: in float64, and rounded as the
kernels round."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from ptx.emulation import Emulated
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.ops import reference_ratio
from diffratio_fast.ops.noise import make_rng

RNG = make_rng(-0x123456789ABCDEF, 0x700000005)
PURPOSES, SUBSTEP = (3, 4), 1
"""The streams of noise of the two halves; score differences use the first."""
DIVERGENCES = list(reference_ratio.DIVERGENCES)
NAMES = ("patch", "position", "mix", "mix_bias", "up", "down", "head")

# channels, height, width, patch, channels C, blocks L, hidden units H
SHAPES = {
    "small": (1, 8, 24, 2, 64, 2, 64),
    "odd": (3, 6, 10, 2, 40, 2, 50),
    "one": (1, 2, 2, 2, 5, 1, 3),
    "tall": (2, 26, 10, 2, 64, 1, 32),
    "16 tokens": (1, 8, 8, 2, 64, 4, 128),
    "fashion": (1, 28, 28, 2, 64, 4, 128),
    "129 tokens": (1, 3, 43, 1, 64, 1, 40),
    "wide": (1, 4, 32, 2, 128, 2, 64),
    "128 tokens": (3, 16, 32, 2, 128, 2, 256),
    "CIFAR-10": (3, 32, 32, 2, 128, 4, 256),
    "odd 128": (3, 9, 66, 3, 100, 2, 70),
    "patch 4": (4, 16, 16, 4, 128, 2, 96),
    "patch 8": (1, 24, 16, 8, 64, 2, 96),
    "256": (4, 4, 8, 2, 256, 1, 48),
    "256, 128 tokens": (3, 16, 32, 2, 200, 2, 100),
    "256, two parts": (1, 16, 36, 2, 200, 2, 24),
    "256, 256 tokens": (3, 32, 32, 2, 256, 2, 96),
}
LARGE = ("CIFAR-10", "128 tokens", "256, 128 tokens", "256, 256 tokens")
"""Shapes of realistic size, which take seconds."""


@dataclass(frozen=True)
class Setting:
    """Parameters that determine a problem's tensors."""

    shape: str
    batch: int
    draws: int = 1
    halves: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class Problem:
    """Weights, images, conditioning, noise levels, upstream gradients of a setting."""

    setting: Setting
    weights: list[Tensor] = field(init=False)
    images: list[Tensor] = field(init=False)
    conditioning: list[Tensor] = field(init=False)
    sigma: Tensor = field(init=False)
    upstream: Tensor = field(init=False)
    index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.setting
        channels, height, width, patch, C, L, H = SHAPES[s.shape]
        generator = torch.Generator().manual_seed(s.seed)
        T, V = (height // patch) * (width // patch), channels * patch**2

        def uniform(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.rand(*shape, generator=generator) * 2 - 1) * scale

        shapes = [(C, V), (T, C), (L, T, T), (L, T), (L, H, C), (L, C, H), (T, C)]
        scales = [1.7 / V**0.5, 0.5, 1.7 / T**0.5, 0.3, 2.4 / C**0.5, 1.7 / H**0.5, 3 / (T * C) ** 0.5]
        self.weights = [uniform(*x, scale=c).to(s.dtype) for x, c in zip(shapes, scales, strict=True)]
        self.images = [uniform(s.batch, channels, height, width).to(s.dtype) for _ in range(s.halves)]
        self.conditioning = [uniform(s.batch, s.draws, C + L * H, scale=0.7) for _ in range(s.halves)]
        self.sigma = uniform(s.batch, s.draws, scale=0.5) + 0.7
        self.upstream = uniform(s.batch, s.draws)
        self.index = torch.tensor([0x1FFFFFFF0 + 3 * i for i in range(s.batch)])

    def noised(self, half: int, draw: int = 0) -> Tensor:
        sigma = self.sigma[:, draw]
        x = self.images[half].float()
        return ops.add_noise(x, sigma, RNG, self.index, PURPOSES[half], substep=SUBSTEP, draw=draw)

    def emulated(self, noised: Tensor, half: int = 0, draw: int = 0) -> Emulated:
        return Emulated(self.weights, noised, self.sigma[:, draw], self.conditioning[half][:, draw])

    def doubles(self) -> list[Tensor]:
        return [w.double() for w in self.weights]


Results = dict[str, Tensor]


def expected_log_ratio(p: Problem, noise: bool) -> tuple[Results, Results]:
    """(emulated, float64) results, like the other functions below."""
    noised = p.noised(0) if noise else p.images[0].float()
    sigma, e = p.sigma[:, 0].double(), p.conditioning[0][:, 0].double()
    exact = reference_ratio.log_ratio(p.doubles(), noised.double(), sigma, e)
    return {"log_ratio": p.emulated(noised).log_ratio}, {"log_ratio": exact}


def expected_backward(p: Problem) -> tuple[Results, Results]:
    emulated = p.emulated(p.images[0].float())
    got = emulated.back(p.upstream[:, 0], True)
    got["conditioning 0"] = got.pop("conditioning")
    e = p.conditioning[0][:, 0].double()
    leaves = [t.requires_grad_() for t in [*p.doubles(), p.images[0].double(), e]]
    value = reference_ratio.log_ratio(leaves[:7], leaves[7], p.sigma[:, 0].double(), leaves[8])
    gradients = torch.autograd.grad((value * p.upstream[:, 0].double()).sum(), leaves)
    exact = {f"weight {i}": gradients[i] for i in range(7)}
    exact |= {"image": gradients[7], "conditioning 0": gradients[8], "log_ratio": value.detach()}
    return got | {"log_ratio": emulated.log_ratio}, exact


def expected_score(p: Problem, divergence: str) -> tuple[Results, Results]:
    draws = p.sigma.shape[1]
    image, ratios = torch.zeros(()), []
    for k in range(draws):
        emulated = p.emulated(p.noised(0, k), 0, k)
        factor = reference_ratio.DIVERGENCES[divergence].factor(emulated.log_ratio)[0]
        image = image + emulated.back(-p.upstream[:, k].double() * factor / draws, False)["image"]
        ratios.append(emulated.log_ratio)
    exact = reference_ratio.score_difference(
        p.doubles(), p.images[0].double(), p.sigma.double(), p.conditioning[0].double(), RNG, p.index,
        weight=p.upstream.double(), divergence=divergence, purpose=PURPOSES[0], substep=SUBSTEP,
    )  # fmt: skip
    got = {"image": image, "log_ratio": torch.stack(ratios, 1)}
    return got, {"image": exact.gradient, "log_ratio": exact.log_ratio}


def expected_loss(p: Problem) -> tuple[Results, Results]:
    got: Results = {}
    total: Results = {}
    values, softplus = [], torch.nn.functional.softplus
    for half, sign in enumerate((-1, 1)):
        emulated = p.emulated(p.noised(half), half)
        values.append(emulated.log_ratio)
        back = emulated.back(sign * torch.sigmoid(sign * emulated.log_ratio) / p.setting.batch, True)
        got[f"conditioning {half}"] = back.pop("conditioning")
        back.pop("image")
        total = {name: total.get(name, 0) + value for name, value in back.items()}
    loss = softplus(-values[0]).mean() + softplus(values[1]).mean()
    e = [x[:, 0].double() for x in p.conditioning]
    r = reference_ratio.ratio_loss(
        p.doubles(), p.images[0].double(), p.images[1].double(), p.sigma[:, 0].double(), *e, RNG, p.index,
        purposes=PURPOSES, substep=SUBSTEP,
    )  # fmt: skip
    exact = {f"weight {i}": g for i, g in enumerate(r.weight_gradients)}
    exact |= {f"conditioning {h}": g for h, g in enumerate(r.conditioning_gradients)}
    exact |= {"log_ratio": torch.stack([r.log_ratio_real, r.log_ratio_fake]), "loss": r.loss[None]}
    return got | total | {"log_ratio": torch.stack(values), "loss": loss[None]}, exact
