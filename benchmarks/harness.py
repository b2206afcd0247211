"""Check first, then time: interleaved providers, on rotating inputs larger than the caches."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import diffratio_fast
from diffratio_fast.devices import device_name

MAX_ROTATION = 1 << 30  # bytes of rotating inputs


@dataclass
class Case:
    """One operation at one shape: its providers, its check and its cost."""

    op: str
    shape: str
    dtype: str
    passes: str  # "forward" or "full" (forward and backward)
    providers: dict[str, Callable[[int], Any]]  # each is called with 0, 1, 2, ... to choose its inputs
    check: Callable[[], None]  # raises AssertionError for a wrong result
    bytes: float  # minimum bytes to read and write
    flops: float | None = None
    about: dict[str, dict[str, Any]] = field(default_factory=dict)  # further fields of a provider's rows


FEWEST = 3
"""Minimum timed calls per provider; a case that runs out of time earlier is skipped."""


class OutOfTime(Exception):
    """The time limit was reached before a case had enough timed calls."""


@dataclass
class Settings:
    device: torch.device
    repeats: int = 50
    deadline: float = math.inf  # of time.monotonic()
    notes: list[str] = field(default_factory=list)  # printed below the table

    def expired(self) -> bool:
        return time.monotonic() >= self.deadline


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes) or 32 << 20


def rotation(device: torch.device, size: int) -> int:
    """How many input sets of `size` bytes exceed twice the last-level cache, within MAX_ROTATION."""
    return max(2, min(-(-2 * cache_bytes(device) // size), MAX_ROTATION // size))


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Suppress messages of the profiler's native code."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of tensors allocated by the call, including its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)
    with quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    del result
    alive = peak = 0
    recorded = profile.profiler.kineto_results.events()
    for event in sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measure(benchmark: str, case: Case, settings: Settings) -> list[dict[str, Any]]:
    """Measure a case: one row per provider; interleaved, so that disturbances affect all providers.

    Raises ``OutOfTime`` if the deadline allows fewer than ``FEWEST`` timed calls per provider.
    """
    case.check()
    order = random.Random(0)
    seconds: dict[str, list[float]] = {}
    for name, call in list(case.providers.items()):
        if settings.expired():
            raise OutOfTime
        try:
            for i in range(3):
                call(i)
            seconds[name] = []
        except Exception as error:  # torch.compile can fail in many ways
            if name == "fused":
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            settings.notes.append(f"{case.op} {name}: not measured ({reason[0][:120]})")
    for i in range(settings.repeats):
        if settings.expired():
            if i < FEWEST:
                raise OutOfTime
            break
        names = list(seconds)
        order.shuffle(names)
        for name in names:
            call = case.providers[name]
            seconds[name].append(timed(lambda call=call, i=i: call(i), settings.device))  # type: ignore[misc]
    rows = []
    for name, values in seconds.items():
        quantiles = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
        median = statistics.median(values)
        rows.append(
            {
                "benchmark": benchmark,
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "provider": name,
                "pass": case.passes,
                "median_s": median,
                "q20_s": quantiles[0],
                "q80_s": quantiles[3],
                "repeats": len(values),
                "peak_bytes": peak_bytes(lambda name=name: case.providers[name](0), settings.device),  # type: ignore[misc]
                "bytes_per_s": case.bytes / median,
                "flop_per_s": case.flops / median if case.flops else None,
                "checked": True,
                **case.about.get(name, {}),
            }
        )
    return rows


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured ceilings of the device: memory copy, and a large matrix product."""
    cuda = device.type == "cuda"
    size = (1 << 30) if cuda else (1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    copies, products = [], []
    for _ in range(10):
        copies.append(timed(lambda: target.copy_(source), device))
        products.append(timed(lambda: torch.mm(a, b), device))
    return {
        "copy_bytes_per_s": 2 * size / min(copies),
        "matmul_flop_per_s": 2 * n**3 / min(products),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The environment of the measurements, without host names and paths."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": cache_bytes(device),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "diffratio_fast": diffratio_fast.__version__,
        "build": diffratio_fast.build_info(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format a table: milliseconds, and speedup over eager."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["op"], row["shape"], row["dtype"], row["pass"])
        groups.setdefault(key, {})[row["provider"]] = row
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [["op", "shape", "dtype", "pass", *(f"{p} ms" for p in providers), "eager/fused"]]
    for labels, found in groups.items():
        times = [f"{found[p]['median_s'] * 1e3:.3g}" if p in found else "-" for p in providers]
        both = "eager" in found and "fused" in found
        ratio = f"{found['eager']['median_s'] / found['fused']['median_s']:.1f}x" if both else "-"
        lines.append([*labels, *times, ratio])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
