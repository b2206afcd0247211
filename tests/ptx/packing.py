"""Packed weights, decoded by the ISA's own layouts of mma's operands: every element is at the
place that mma reads."""

from __future__ import annotations

import torch
from ptx.problems import Problem
from ptx.simulator import Failure
from torch import Tensor

_LANE = torch.arange(32)
_G, _Q = (_LANE // 4)[:, None], (_LANE % 4)[:, None]
_I = torch.arange(8)
# a_i of m16n8k16 (ISA): row and column of element i of a lane
A_ROW = _G + torch.where((_I < 2) | ((_I >= 4) & (_I < 6)), 0, 8)
A_COLUMN = _Q * 2 + (_I & 1) + torch.where(_I >= 4, 8, 0)
# b_i (i < 4) of columns 0 to 7, then of columns 8 to 15
B_ROW = _Q * 2 + (_I % 4 & 1) + torch.where(_I % 4 >= 2, 8, 0)
B_COLUMN = _G.expand(32, 8) + torch.where(_I >= 4, 8, 0)
# c_k: accumulators
_K = torch.arange(4)
C_ROW, C_COLUMN = _G + torch.where(_K >= 2, 8, 0), _Q * 2 + (_K & 1)


def pad(m: Tensor, *shape: int) -> Tensor:
    out = torch.zeros(shape)
    out[tuple(slice(n) for n in m.shape)] = m
    return out


def pieces(raw: Tensor, operand: str) -> Tensor:
    """[n, 16, 16]: the matrices that 512 bytes each hold, as operand a or b."""
    elements = raw.view(torch.bfloat16).float().reshape(-1, 32, 8)
    out = torch.full((len(elements), 16, 16), float("nan"))
    row, column = (A_ROW, A_COLUMN) if operand == "a" else (B_ROW, B_COLUMN)
    out[:, row, column] = elements
    return out


def grid(m: Tensor) -> Tensor:
    """A matrix in bf16, in pieces of 16 x 16, row by row."""
    rows, columns = m.shape
    m = m.bfloat16().float().reshape(rows // 16, 16, columns // 16, 16)
    return m.transpose(1, 2).reshape(-1, 16, 16)


def accumulators(raw: Tensor, rows: int, columns: int) -> Tensor:
    elements = raw.view(torch.float32).reshape(rows // 16, columns // 8, 32, 4)
    out = torch.full((rows // 16, columns // 8, 16, 8), float("nan"))
    out[:, :, C_ROW, C_COLUMN] = elements
    return out.permute(0, 2, 1, 3).reshape(rows, columns)


class Reader:
    """Reads packed bytes in order; parts begin at multiples of 512."""

    def __init__(self, raw: Tensor) -> None:
        self.raw, self.at = raw, 0

    def take(self, size: int) -> Tensor:
        part = self.raw[self.at : self.at + size]
        self.at += -(-size // 512) * 512
        return part


def check_packed(raw: Tensor, p: Problem) -> None:
    """``raw`` are the problem's weights packed by the kernel; a ``Failure`` names the first wrong part."""
    patch, position, mix, mix_bias, up, down, head = (w.float() for w in p.weights)
    (C, V), (T, _), (L, H, _) = patch.shape, position.shape, up.shape
    rows = 32 if T > 128 else 16
    t, w = -(-T // rows) * rows, 64 if C <= 64 else 128 if C <= 128 else 256
    h, v = -(-H // 32) * 32, -(-V // 16) * 16
    reader = Reader(raw)

    def same(name: str, a: Tensor, b: Tensor) -> None:
        if not torch.equal(a, b):
            raise Failure(f"wrong result: packed {name}")

    same("position", accumulators(reader.take(4 * t * w), t, w), pad(position, t, w))
    same("head", accumulators(reader.take(4 * t * w), t, w), pad(head, t, w))
    same("mix_bias", reader.take(4 * L * t).view(torch.float32).reshape(L, t), pad(mix_bias, L, t))
    padded = pad(patch, w, v)
    same("patch, transposed", pieces(reader.take(2 * v * w), "b"), grid(padded.T))  # z patch^T
    same("patch", pieces(reader.take(2 * v * w), "b"), grid(padded))  # g patch
    mixes = pad(mix, L, t, t)
    same("mix", pieces(reader.take(2 * L * t * t), "a"), torch.cat([grid(m) for m in mixes]))
    same("mix, transposed", pieces(reader.take(2 * L * t * t), "a"), torch.cat([grid(m.T) for m in mixes]))
    ups, downs, wide = pad(up, L, h, w), pad(down, L, w, h), w // 16
    forward = pieces(reader.take(4 * L * h * w), "b").reshape(L, h // 16, 2, wide, 16, 16)
    backward = pieces(reader.take(6 * L * h * w), "b").reshape(L, h // 16, 3, wide, 16, 16)
    for block in range(L):
        for chunk in range(h // 16):
            hidden = slice(16 * chunk, 16 * chunk + 16)
            u, d = ups[block, hidden].bfloat16().float(), downs[block, :, hidden].bfloat16().float()
            up_b = u.T.reshape(wide, 16, 16)  # k over channels, n over hidden units
            down_b = d.T.reshape(16, wide, 16).transpose(0, 1)  # k over hidden units, n over channels
            down_t = d.reshape(wide, 16, 16)  # k over channels, n over hidden units
            up_t = u.reshape(16, wide, 16).transpose(0, 1)  # k over hidden units, n over channels
            place = f"of block {block}, hidden units from {16 * chunk}"
            same(f"up {place}", forward[block, chunk, 0], up_b)
            same(f"down {place}", forward[block, chunk, 1], down_b)
            for n, want in enumerate((down_t, up_b, up_t)):
                same(f"matrix {n} of the backward pass {place}", backward[block, chunk, n], want)
    if reader.at != raw.numel():
        raise Failure(f"wrong result: {raw.numel()} packed bytes, of which {reader.at} are known")
