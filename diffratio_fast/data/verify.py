"""``prepare --verify``: check every byte of a prepared data set against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from diffratio_fast.data.manifest import CHECKSUMS, LABELS, RESTORE, Manifest, read_manifest
from diffratio_fast.data.records import check_labels, check_size, load_index
from diffratio_fast.errors import UserError

CHUNK_BYTES = 8 << 20


def verify(
    directory: Path, *, threads: int = 4, progress: Callable[[int], object] = lambda size: None
) -> tuple[Manifest, list[str]]:
    """Return the manifest and one line per error; an empty list means the data set is intact.

    Checks sizes and sha256 of shards and index files, every record's xxh3, and the range of labels.
    ``progress`` is called with the bytes read. Raises ``UserError`` without a readable manifest.
    """
    manifest = read_manifest(directory)
    problems: list[str] = []

    def attempt(check: Callable[[], None]) -> None:
        try:
            check()
        except UserError as error:
            problems.append(str(error))

    checksums: list[np.ndarray] = []
    for file, dtype in ((LABELS, np.dtype("<i8")), (CHECKSUMS, np.dtype("<u8"))):

        def check_index(file: str = file, dtype: np.dtype = dtype) -> None:
            index = load_index(directory / file, dtype, manifest.records)
            _check_digest(directory / file, (directory / file).read_bytes(), manifest.sha256[file])
            if file == LABELS:
                check_labels(directory / file, index, len(manifest.class_names))
            else:
                checksums.append(index)

        attempt(check_index)
    starts = np.cumsum([0] + [shard.records for shard in manifest.shards])

    def check_shard(number: int) -> list[str]:
        shard = manifest.shards[number]
        expected = checksums[0][starts[number] : starts[number + 1]] if checksums else None
        try:
            check_size(directory / shard.file, shard.size)
            path, first = directory / shard.file, int(starts[number])
            return _check_shard(path, manifest, number, expected, first, progress)
        except (UserError, OSError) as error:
            return [str(error)]

    with ThreadPoolExecutor(threads) as pool:
        for lines in pool.map(check_shard, range(len(manifest.shards))):
            problems += lines
    return manifest, problems


def _check_shard(
    path: Path,
    manifest: Manifest,
    number: int,
    checksums: np.ndarray | None,
    first: int,
    progress: Callable[[int], object],
) -> list[str]:
    size = manifest.record_bytes
    digest = hashlib.sha256()
    damaged: list[int] = []
    record = 0
    with path.open("rb") as file:
        while content := file.read(max(1, CHUNK_BYTES // size) * size):
            digest.update(content)
            for offset in range(0, len(content), size):
                found = xxhash.xxh3_64_intdigest(memoryview(content)[offset : offset + size])
                if checksums is not None and found != checksums[record]:
                    damaged.append(record)
                record += 1
            progress(len(content))
    lines = [
        f"{path}: record {first + r} (number {r} of this shard) is damaged: wrong xxh3" for r in damaged[:10]
    ]
    if len(damaged) > 10:
        lines.append(f"{path}: {len(damaged) - 10} more records are damaged")
    if not damaged and digest.hexdigest() != manifest.shards[number].sha256:
        lines.append(f"{path}: sha256 does not match the manifest")
    return lines


def _check_digest(path: Path, content: bytes, sha256: str) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: sha256 does not match the manifest; {RESTORE}")
