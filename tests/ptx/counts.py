"""Counts of a case: instructions by class, bank conflicts of shared memory, sectors of global
memory requests."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, fields

from ptx.cases import Case
from ptx.simulator import Simulator

CLASSES = [
    ("mma", r"mma"), ("ldmatrix", r"ldmatrix"), ("ld.shared, 16 bytes", r"ld\.shared\.v4"),
    ("ld.shared, less", r"ld\.shared"), ("st.shared", r"st\.shared"), ("cp.async, 16 bytes",
    r"cp\.async\.c[ag]\."),
    ("cp.async commit, wait", r"cp\.async"), ("ld.global, 16 bytes", r"ld\.global\S*\.v4"),
    ("ld.global, less", r"ld\.(global|volatile)"), ("st.global, 16 bytes", r"st\.global\S*\.v4"),
    ("st.global, less", r"st\.global"), ("ld.param", r"ld\.param"),
    ("atomics, fences", r"atom|red\.|ld\.acquire|membar|fence"), ("bar.sync", r"bar\.(sync|arrive)"),
    ("bar.warp.sync", r"bar\.warp"), ("shfl", r"shfl"), ("tanh.approx", r"tanh"),
    ("ex2, rcp, sqrt, div", r"ex2|lg2|rcp|rsqrt|sqrt|div\.rn"), ("cvt.bf16x2", r"cvt\.rn\.bf16x2"),
    ("cvt, other", r"cvt"),
    ("fp32 fma", r"fma"), ("fp32 add, mul", r"(add|mul|sub)(\.r[nz])?\.f32"),
    ("fp32, other", r"(max|min|neg|abs|selp|setp\.\w+)\.f32"), ("integer div, rem", r"(div|rem)\.[su]"),
    ("integer mul, mad", r"(mul|mad)"), ("branch", r"bra|ret"), ("mov", r"mov|cvta"), ("integer, other",
    r"."),
]  # fmt: skip


@dataclass
class Row:
    """A class of instructions, or one instruction; fields as in interpreter.h, over all warps."""

    warps: int = 0
    lanes: int = 0
    accesses: int = 0
    wavefronts: int = 0
    fewest: int = 0
    requests: int = 0
    sectors: int = 0
    lines: int = 0
    bytes: int = 0

    def add(self, other: Row) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def text(self, name: str, warps: int, share: float) -> str:
        line = f"{name:24} {self.warps / warps:12.1f} {share:6.1%}"
        line += (
            f" {self.wavefronts / self.accesses:10.2f} {self.fewest / self.accesses:8.2f}"
            if self.accesses
            else " " * 20
        )
        return line + (f" {self.sectors / self.requests:12.2f}" if self.requests else "")


def report(simulator: Simulator, case: Case) -> str:
    """A table for each kernel that the case launches; instructions are those that a warp issues."""
    simulator.text("statistics")
    simulator.text("launches")
    Case(case.name, case.run, {**case.options, "statistics": True, "races": False}, case.skewed)(simulator)
    warps: dict[str, int] = defaultdict(int)
    for line in simulator.text("launches").splitlines():
        kernel, blocks, threads = re.match(r"(\S+) (\d+) x (\d+)", line).groups()  # type: ignore[union-attr]
        warps[kernel] += int(blocks) * int(threads) // 32
    rows: dict[str, list[tuple[str, str, Row]]] = defaultdict(list)
    for line in simulator.text("statistics").splitlines():
        kernel, place, _, *numbers, instruction = line.split("\t")
        rows[kernel].append((place, instruction, Row(*map(int, numbers))))
    return "\n\n".join(_table(kernel, warps[kernel], found) for kernel, found in rows.items())


def _table(kernel: str, warps: int, rows: list[tuple[str, str, Row]]) -> str:
    total, by_class = Row(), defaultdict(Row)
    for _, instruction, row in rows:
        total.add(row)
        by_class[next(name for name, pattern in CLASSES if re.match(pattern, instruction))].add(row)
    lines = [
        kernel,
        f"{'class':24} {'a warp':>12} {'share':>6} {'wavefronts':>10} {'fewest':>8} {'sectors':>12}",
    ]
    lines += [
        by_class[name].text(name, warps, by_class[name].warps / total.warps)
        for name, _ in CLASSES
        if name in by_class
    ]
    lines.append(total.text("all", warps, 1.0))
    lines.append(
        f"wavefronts of shared memory: {total.wavefronts}, sectors of global memory: {total.sectors}"
    )
    conflicts = sorted(
        (r for r in rows if r[2].wavefronts > r[2].fewest), key=lambda r: r[2].fewest - r[2].wavefronts
    )
    for place, text, row in conflicts[:10]:
        found, fewest = row.wavefronts / row.accesses, row.fewest / row.accesses
        lines.append(f"  conflicts at {place}: {found:.2f} wavefronts, not {fewest:.2f}: {text}")
    return "\n".join(lines)
