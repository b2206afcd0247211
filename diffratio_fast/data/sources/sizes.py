"""Sizes of the images of a source, read from their headers before anything is decoded or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

from diffratio_fast.data.sources.files import FileSource
from diffratio_fast.errors import UserError

RESOLUTIONS = (16, 32, 64, 128, 256, 512)
LARGEST_PROPOSAL = 64
"""The presets for images of one's own are for 32 x 32 and 64 x 64 pixels."""
ENOUGH = 2_000
"""Images looked at, once two sizes were seen, to propose a resolution."""
SMALL_SHARE = 0.05
"""Share of the images whose shorter side may be below the proposed resolution."""
BLOCK = 256
Size = tuple[int, int]


def require_one_size(
    source: FileSource,
    pool: Executor,
    progress: Callable[[int], None] = lambda images: None,
    *,
    odd_share: float = 0.0,
) -> None:
    """Raise ``UserError``, with a resolution to choose, unless all images have one (width, height).

    ``odd_share`` of them may differ from the source's shape. Images whose header cannot be read are ignored:
    reading them reports why.
    """
    seen: Counter[Size] = Counter()  # how many images of each size
    examples: dict[Size, str] = {}
    for start in range(0, len(source), BLOCK):
        numbers = range(start, min(start + BLOCK, len(source)))
        for number, size in zip(numbers, pool.map(source.size, numbers), strict=True):
            if size is not None:
                seen[size] += 1
                examples.setdefault(size, source.key(number))
        progress(len(numbers))
        if len(seen) > 1 and seen.total() >= ENOUGH:
            break
    usual = (source.shape[2], source.shape[1])
    if seen.total() - seen[usual] <= odd_share * seen.total():
        return
    small, large = (pick(seen, key=lambda size: size[0] * size[1]) for pick in (min, max))
    looked_at = "" if seen.total() == len(source) else f" of the first {seen.total():,} images"
    raise UserError(
        f"{source.path}: the images{looked_at} have {len(seen):,} different sizes, from {_text(small)} "
        f"({examples[small]}) to {_text(large)} ({examples[large]}), but a data set has one; pass "
        f"--resolution {proposed_resolution(seen.elements())} to crop and scale all of them (nothing was "
        "written)"
    )


def proposed_resolution(sizes: Iterable[Size]) -> int:
    """The largest usual resolution, up to ``LARGEST_PROPOSAL``, that nearly all images have."""
    shorter = sorted(min(size) for size in sizes)
    low = shorter[int(SMALL_SHARE * len(shorter))]
    return max((r for r in RESOLUTIONS if r <= min(low, LARGEST_PROPOSAL)), default=RESOLUTIONS[0])


def _text(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
