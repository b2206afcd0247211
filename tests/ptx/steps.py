"""The weights pass followed step by step in float64, with the kernel's own staged operands in every matrix
product, so that a different rounding cannot propagate.

Every staged value must be a correct rounding, except for ``excess`` of the largest; every other result must
be right to float32. Then the forward and the image pass must give the same bits as this pass.
"""

from __future__ import annotations

from typing import Any

import torch
from ptx.emulation import input_scale, patches, rounded, unpatch
from ptx.operations import Form, Objective, Outcome, Pass, mixer, pack_weights
from ptx.problems import NAMES, PURPOSES, RNG, SUBSTEP, Problem, Setting
from ptx.simulator import Failure, Simulator
from torch import Tensor

EXCESS, FLOAT32 = 2e-6, 4e-6
"""Allowed: beyond half a unit in the last place, relative to the largest value; and of float32 results."""


def columns_of(count: int, group: int) -> Tensor:
    """Where column i of a staged row lies, from the accumulators of m16n8: lane q of a quad holds columns 8
    n + 2 q and the next of tile n, and writes what it has of ``group`` columns as one vector."""
    i = torch.arange(count)
    return i // group * group + i % 8 // 2 * (group // 4) + i % group // 8 * 2 + i % 2


class Errors:
    """The largest excess of a rounding and the largest error of a float32 result, each with its name."""

    def __init__(self) -> None:
        self.excess: tuple[float, str] = (0.0, "")
        self.float32: tuple[float, str] = (0.0, "")

    def rounding(self, name: str, staged: Tensor, exact: Tensor) -> None:
        exponent = torch.frexp(exact.abs().clamp_min(2.0**-120))[1]
        half = torch.ldexp(torch.ones_like(exact), exponent - 9)
        over = float(((staged - exact).abs() - half).max() / exact.abs().max().clamp_min(1e-30))
        self.excess = max(self.excess, (over if torch.isfinite(staged).all() else float("inf"), name))

    def close(self, name: str, a: Tensor, b: Tensor, scale: float = 0.0) -> None:
        error = float((a.double() - b).abs().max() / max(float(b.abs().max()), scale, 1e-30))
        self.float32 = max(self.float32, (error if torch.isfinite(a).all() else float("inf"), name))

    def check(self) -> None:
        if self.excess[0] >= EXCESS:
            raise Failure(
                f"wrong result: {self.excess[1]} is no rounding, by {self.excess[0]:.1e} of the largest"
            )
        if self.float32[0] >= FLOAT32:
            raise Failure(f"wrong result: {self.float32[1]}, error {self.float32[0]:.1e}")


class Staged:
    """The staged operands of one unit, in the order of channels and hidden units."""

    def __init__(self, outcome: Outcome, unit: int, p: Problem) -> None:
        (C, V), (T, _) = p.weights[0].shape, p.weights[1].shape
        L, H, _ = p.weights[4].shape
        tokens, width, hidden, vector = outcome.arguments.padded
        rows = 32 if T > 128 else 16
        by_channel = columns_of(width, 32)[:C]
        by_hidden = columns_of(hidden, 16 if width * rows >= 4096 else 32)[:H]
        base = unit * outcome.arguments.unit_bytes

        def part(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
            size = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
            begin = base + outcome.staged_at(name)
            return outcome.kept[begin : begin + size].view(dtype).double().reshape(shape)

        bf16 = torch.bfloat16
        self.by_name = {
            n: part(n, bf16, L, tokens, width)[:, :T][:, :, by_channel] for n in ("h", "m", "g", "gm")
        }
        self.by_name |= {n: part(n, bf16, L, tokens, hidden)[:, :T][:, :, by_hidden] for n in ("a", "gu")}
        self.last, self.first = (part(n, bf16, tokens, width)[:T][:, by_channel] for n in ("last", "first"))
        z = part("z", bf16, tokens, vector)
        if (z[T:] != 0).any() or (z[:, V:] != 0).any():
            raise Failure("wrong result: padding of patch vectors is not zero")
        self.z = z[:T, :V]
        self.row_sums = part("rows", torch.float32, L, tokens)[:, :T]

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]


class Follower:
    """Follows the units of a call of the weights pass, and sums the weight gradients."""

    def __init__(self, p: Problem, outcome: Outcome, given: bool) -> None:
        self.p, self.outcome, self.given = p, outcome, given
        patch, self.position, mix, self.mix_bias, up, down, self.head = p.doubles()
        self.patch, self.mix, self.up, self.down = (rounded(w) for w in (patch, mix, up, down))
        self.total = [torch.zeros_like(w, dtype=torch.float64) for w in p.weights]
        self.errors, self.loss = Errors(), 0.0

    def unit(self, half: int, sample: int, z: Tensor) -> None:
        p, got, errors = self.p, self.outcome.results, self.errors
        number = half * p.setting.batch + sample
        staged = Staged(self.outcome, number, p)
        if not torch.equal(staged.z, z):
            raise Failure(f"wrong result: patch vectors of unit {number}")
        depth, hidden, channels = self.up.shape
        e = p.conditioning[half][sample, 0].double()
        by_block = e[channels:].reshape(depth, hidden)
        h, u = z @ self.patch.T + self.position + e[:channels], []
        for block in range(depth):
            errors.rounding(f"h {block}", staged["h"][block], h)
            m = h + self.mix[block] @ staged["h"][block] + self.mix_bias[block][:, None]
            errors.rounding(f"m {block}", staged["m"][block], m)
            u.append(staged["m"][block] @ self.up[block].T + by_block[block])
            errors.rounding(f"a {block}", staged["a"][block], u[block] * torch.sigmoid(u[block]))
            h = 0.7 * (m + staged["a"][block] @ self.down[block].T)
        ratio = got["log_ratio"][number].double()
        terms = self.head * h
        errors.close("log ratio", ratio, terms.sum(), float(terms.abs().sum()) / 10)
        slope = self.slope(half, sample, ratio)
        errors.rounding("last", staged.last, h * slope)
        self.total[6] += staged.last
        self.back(half, sample, staged, u, self.head * 0.7 * slope)

    def slope(self, half: int, sample: int, ratio: Tensor) -> Tensor:
        if self.given:
            return self.p.upstream[sample, 0].double()
        sign, batch = (-1 if half == 0 else 1), self.p.setting.batch
        self.loss += float(torch.nn.functional.softplus(sign * ratio)) / batch
        return sign * torch.sigmoid(sign * ratio) / batch

    def back(self, half: int, sample: int, staged: Staged, u: list[Tensor], g: Tensor) -> None:
        p, got, errors = self.p, self.outcome.results, self.errors
        by_block = [torch.empty(0)] * len(u)
        for block in reversed(range(len(u))):
            errors.rounding(f"g {block}", staged["g"][block], g)
            s = torch.sigmoid(u[block])
            gu = (staged["g"][block] @ self.down[block]) * (s + u[block] * s * (1 - s))
            errors.rounding(f"gu {block}", staged["gu"][block], gu)
            by_block[block] = gu.sum(0)
            gm = g + staged["gu"][block] @ self.up[block]
            errors.rounding(f"gm {block}", staged["gm"][block], gm)
            scale = float(gm.abs().sum(1).max()) / 10
            errors.close(f"row sums {block}", staged.row_sums[block], gm.sum(1), scale)
            self.total[2][block] += staged["gm"][block] @ staged["h"][block].T
            self.total[3][block] += gm.sum(1)
            self.total[4][block] += staged["gu"][block].T @ staged["m"][block]
            self.total[5][block] += staged["g"][block].T @ staged["a"][block]
            g = gm + self.mix[block].T @ staged["gm"][block]
            if block > 0:
                g = 0.7 * g
        errors.rounding("first", staged.first, g)
        self.total[0] += staged.first.T @ staged.z
        self.total[1] += staged.first
        scale = float(g.abs().sum(0).max()) / 10
        conditioning = torch.cat([g.sum(0), *by_block])
        errors.close("conditioning", got[f"conditioning {half}"][sample], conditioning, scale)
        if self.given:
            shape = (1, *p.images[0].shape[1:])
            size = round((self.patch.shape[1] / shape[1]) ** 0.5)
            image = unpatch((staged.first @ self.patch)[None], shape, size)[0]
            errors.close("image", got["image"][sample], image * input_scale(p.sigma[sample, 0]).double())

    def finish(self) -> None:
        got = self.outcome.results
        for i, exact in enumerate(self.total):
            if self.p.setting.dtype == torch.bfloat16:
                self.errors.rounding(NAMES[i], got[f"weight {i}"].double(), exact)
            else:
                self.errors.close(NAMES[i], got[f"weight {i}"], exact)
        if not self.given:
            self.errors.close("loss", got["loss"], torch.tensor([self.loss], dtype=torch.float64))
        self.errors.check()


def follow(simulator: Simulator, setting: Setting, form: Form, objective: Objective) -> str:
    """Raise ``Failure`` if a step is wrong; else return a line with the errors."""
    p = Problem(setting)
    packed = pack_weights(simulator, p.weights, tuple(p.images[0].shape[1:]))
    noise = RNG, p.index, PURPOSES, SUBSTEP
    given = objective is Objective.GIVEN
    common: dict[str, Any] = {"packed": packed, "noise": noise}
    sigma, e = p.sigma[:, 0], [x[:, 0] for x in p.conditioning]
    got = mixer(
        simulator, p.weights, p.images, sigma, e, pass_=Pass.WEIGHTS, objective=objective, form=form,
        upstream=p.upstream[:, 0] if given else None, want_image=given, keep=1 << 28, **common,
    )  # fmt: skip
    follower = Follower(p, got, given)
    size = round((p.weights[0].shape[1] / p.images[0].shape[1]) ** 0.5)
    for half in range(setting.halves):
        z = rounded(patches(p.noised(half) * input_scale(sigma)[:, None, None, None], size))
        for sample in range(setting.batch):
            follower.unit(half, sample, z[sample])
    follower.finish()
    if given:
        forward = mixer(
            simulator, p.weights, p.images, sigma, e, pass_=Pass.FORWARD, objective=Objective.NONE, **common
        )
        score = mixer(
            simulator, p.weights, p.images, p.sigma, p.conditioning, pass_=Pass.IMAGE,
            objective=Objective.SCORE,
            upstream=-p.upstream, **common,
        )  # fmt: skip
        for other, name in ((forward, "log_ratio"), (score, "log_ratio"), (score, "image")):
            if not torch.equal(other.results[name], got.results[name]):
                raise Failure(f"wrong result: {name} of another pass has other bits")
    errors = follower.errors
    return (
        f"excess {errors.excess[0]:.1e}, float32 {errors.float32[0]:.1e} ({errors.float32[1]}); {got.launch}"
    )
