"""``prepare --info``: a text summary and a contact sheet of a prepared data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffratio_fast.data.dataset import SPLITS
from diffratio_fast.data.pictures import grid, png, viewable
from diffratio_fast.data.shards import ShardDataSet
from diffratio_fast.storage.writing import replace_file

COLUMNS = 12
ROWS = 12


def describe(data: ShardDataSet) -> str:
    """A summary of a few lines: kind, splits, classes, scaling, and statistics per channel."""
    m = data.manifest
    total = sum(shard.size for shard in m.shards)
    more = ", …" if len(m.class_names) > 12 else ""
    lines = [
        f"{m.name}: {m.records:,} records of {m.kind} {list(m.shape)} {m.dtype.name}, "
        f"{m.record_bytes:,} bytes each, {total / 2**20:,.1f} MiB in {len(m.shards)} shards",
        "splits: " + ", ".join(f"{s} {data.count(s):,}" for s in SPLITS),
        f"classes: {len(m.class_names)} ({', '.join(m.class_names[:12])}{more})",
    ]
    if m.vae:
        lines.append(f"VAE: {m.vae.name} (sha256 {m.vae.sha256 or 'unknown'})")
    low = "" if m.scaling.low is None else f", values {m.scaling.low:g} to {m.scaling.high:g}"
    lines.append(f"scaling: mean {_row(m.scaling.mean)}, std {_row(m.scaling.std)}{low}")
    lines.append(
        f"source: {m.source.get('format')}, {m.source.get('unreadable', 0)} unreadable records skipped"
    )
    lines.append(f"{'channel':>10} {'mean':>10} {'std':>10} {'min':>10} {'max':>10}   (training records)")
    statistics = zip(m.statistics.mean, m.statistics.std, m.statistics.min, m.statistics.max, strict=True)
    for channel, row in enumerate(statistics):
        half = m.shape[0] // 2
        label = f"{channel}"
        if m.vae:
            label = f"mean {channel}" if channel < half else f"std {channel - half}"
        lines.append(f"{label:>10} " + " ".join(f"{value:>10.4g}" for value in row))
    return "\n".join(lines)


def _row(values: tuple[float, ...]) -> str:
    return "/".join(f"{v:.5g}" for v in values)


def contact_sheet(data: ShardDataSet, path: Path) -> None:
    """Write a PNG of training records: one row per class (at most ``ROWS``), ``COLUMNS`` records per row.

    Latents are converted by ``pictures.viewable``.
    """
    first, end = data.manifest.splits["train"]
    labels = data.labels(first, min(end, first + 100_000))
    rows = [first + np.flatnonzero(labels == c)[:COLUMNS] for c in range(len(data.class_names))]
    rows = [row for row in rows if len(row)][:ROWS]
    if len(data.class_names) == 1:  # without classes the records fill the sheet
        rows = np.array_split(np.arange(first, min(end, first + ROWS * COLUMNS)), ROWS)
    records, _ = data.read(np.concatenate(rows))
    cells = torch.full((len(rows) * COLUMNS, 3, *data.shape[1:]), 255, dtype=torch.uint8)
    filled = np.concatenate([r * COLUMNS + np.arange(len(row)) for r, row in enumerate(rows)])
    cells[torch.from_numpy(filled)] = _viewable(data, records)
    replace_file(path, png(grid(cells, COLUMNS)))


def _viewable(data: ShardDataSet, records: Tensor) -> Tensor:
    """Stored records as uint8 [N, 3, H, W]; for latents, the mean of the moments."""
    if data.kind != "image":
        records = records[:, : data.shape[0] // 2]
    pictures = viewable(data.scaling.to_model(records.float()), data.scaling)
    return pictures[:, [min(channel, pictures.shape[1] - 1) for channel in range(3)]]
