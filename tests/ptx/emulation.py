"""The ratio operations in float64, rounded to bfloat16 where csrc/cuda/ratio/mixer_kernel.cuh states that
it rounds: operands of matrix products, checkpoints, staged operands of the weight gradients. Nothing else
is rounded, so a kernel must agree to about the accuracy of float32, except for values that are
rounded in the other direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESIDUAL = 0.7


def rounded(x: Tensor) -> Tensor:
    """To bfloat16, in float64."""
    return x.float().bfloat16().double()


def patches(x: Tensor, size: int) -> Tensor:
    """[B, T, V]: the patches of images in the order of tokens."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatch(z: Tensor, shape: Sequence[int], size: int) -> Tensor:
    """The images of patches, the inverse of ``patches``."""
    b, c, h, w = shape
    z = z.reshape(b, h // size, w // size, c, size, size)
    return z.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def input_scale(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    s = sigma.float()
    return 1.0 / (s * s + torch.tensor(sigma_data) ** 2).sqrt()


class Emulated:
    """The forward pass of one batch of noised fp32 images; then ``back``."""

    def __init__(self, weights: Sequence[Tensor], noised: Tensor, sigma: Tensor, e: Tensor) -> None:
        patch, position, mix, mix_bias, up, down, head = (w.double() for w in weights)
        self.patch, self.mix, self.up, self.down = (rounded(w) for w in (patch, mix, up, down))
        self.head = head
        self.shape = noised.shape
        channels, vector = self.patch.shape
        self.size = round((vector / noised.shape[1]) ** 0.5)
        self.depth, hidden, _ = self.up.shape
        self.scale = input_scale(sigma)
        self.z = rounded(patches(noised.float() * self.scale[:, None, None, None], self.size))
        token, *by_block = e.double()[:, None].split([channels, *[hidden] * self.depth], dim=2)
        h = self.z @ self.patch.T + position + token
        self.h, self.m, self.s, self.u = [], [], [], []
        for block in range(self.depth):
            self.h.append(rounded(h))
            m = h + self.mix[block] @ rounded(h) + mix_bias[block][:, None]
            self.m.append(rounded(m))
            u = rounded(m) @ self.up[block].T + by_block[block]
            s = 0.5 + 0.5 * torch.tanh(0.5 * u)
            self.u.append(u)
            self.s.append(s)
            h = RESIDUAL * (m + rounded(u * s) @ self.down[block].T)
        self.last = h
        self.log_ratio = (self.head * h).sum((1, 2))

    def back(self, slope: Tensor, weights: bool) -> dict[str, Tensor]:
        """Gradients of sum_i slope_i log_ratio_i, of the weights too if requested."""
        slope = slope.double()[:, None, None]
        found: dict[str, list[Tensor]] = {name: [] for name in ("mix", "bias", "up", "down", "e")}
        g = self.head * RESIDUAL * slope
        for block in reversed(range(self.depth)):
            outer = rounded(g)
            s, u = self.s[block], self.u[block]
            silu = u * s
            gu = (outer @ self.down[block]) * (s + silu * (1 - s))
            gm = g + rounded(gu) @ self.up[block]
            if weights:
                found["down"].append(torch.einsum("btc,bth->ch", outer, rounded(silu)))
                found["up"].append(torch.einsum("bth,btc->hc", rounded(gu), self.m[block]))
                found["e"].append(gu.sum(1))
                found["bias"].append(gm.sum((0, 2)))
                found["mix"].append(torch.einsum("btc,bsc->ts", rounded(gm), self.h[block]))
            g = gm + self.mix[block].T @ rounded(gm)
            if block > 0:
                g = g * RESIDUAL
        image = unpatch(rounded(g) @ self.patch, self.shape, self.size)
        out = {"image": image * self.scale.double()[:, None, None, None]}
        if weights:
            out["weight 0"] = torch.einsum("btc,btv->cv", rounded(g), self.z)
            out["weight 1"] = rounded(g).sum(0)
            for i, name in enumerate(("mix", "bias", "up", "down"), 2):
                out[f"weight {i}"] = torch.stack(found[name][::-1])
            out["weight 6"] = rounded(self.last * slope).sum(0)
            out["conditioning"] = torch.cat([g.sum(1), *found["e"][::-1]], dim=1)
        return out
