"""The format of a checkpoint on disk: names, index and integrity checks.

``step-00001000/`` contains one safetensors file per process and ``index.json`` with their names, sizes and
digests. The content is JSON and numbers: reading runs no code.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, open_regular, parse_json, read_bytes

FORMAT = "diffratio_fast.checkpoint.2"
INDEX = "index.json"
INDEX_LIMIT = 1 << 26
ADVICE = "restore it from a copy, or start over with --fresh"
NAME = re.compile(r"step-\d{8,}")


class Damaged(Exception):
    """A checkpoint differs from what was written; the message describes the difference."""


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def candidates(root: Path) -> list[Path]:
    """The checkpoints in ``root`` by name, newest first, without symbolic links."""
    found = [
        path
        for path in root.glob("step-*")
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def exists(root: Path) -> bool:
    """Whether there is a checkpoint, in any state or version."""
    return bool(candidates(root)) or (root / "state.safetensors").exists()


def read_index(path: Path) -> dict[str, Any]:
    """Read the index of the checkpoint ``path`` and check all its files; raise ``Damaged`` on a mismatch."""
    try:
        index: dict[str, Any] = parse_json(read_bytes(path / INDEX, INDEX_LIMIT))
        if index.pop("digest") != digest_of_index(index):  # first, because the format field may be damaged
            raise Damaged(f"the digest of {INDEX} does not match")
        if index["format"] != FORMAT:
            raise UserError(f"{path}: not a checkpoint of this version of diffratio_fast; {ADVICE}")
        files: dict[str, Any] = index["files"]
        if not files or {file.name for file in path.glob("*.safetensors")} != set(files):
            raise Damaged(f"{INDEX} names other files than there are")
        for name, about in files.items():
            check_file(path / name, about)
        if index["step"] != step_of(path.name.removesuffix(".tmp")) or not isinstance(index["best"], dict):
            raise Damaged(f"{INDEX} holds values of other types")
        index["seconds"] = float(index["seconds"])
    except OSError as error:
        raise Damaged(f"{Path(error.filename or INDEX).name}: {error.strerror or error}") from None
    except DAMAGE:
        raise Damaged(f"{INDEX} is no index") from None
    return index


def check_file(path: Path, about: dict[str, Any]) -> None:
    """Raise ``Damaged`` unless a file has the size and digest in ``about``."""
    size = path.stat().st_size
    if size != about["bytes"]:
        raise Damaged(f"{path.name} has {size} bytes in place of {about['bytes']}")
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while content := file.read(8 << 20):
            digest.update(content)
    if digest.hexdigest() != about["xxh3_128"]:
        raise Damaged(f"the digest of {path.name} does not match")


def digest_of_index(index: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(index, sort_keys=True).encode())


def newest_complete(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint in ``root`` and its index; None if there is none."""
    for path in candidates(root):
        try:
            return path, read_index(path)
        except Damaged:
            continue
    return None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep: the ``newest``, one per ``every_images`` images, optionally the best."""

    newest: int = 2
    every_images: int | None = None
    best: bool = False
    batch_size: int = 1


def kept(steps: list[int], policy: Retention, best: int | None) -> set[int]:
    """The steps of the checkpoints to keep; ``best`` is the step of the best evaluation.

    In each interval of ``every_images`` images the first is kept, so later steps do not replace it.
    """
    ordered = sorted(steps)
    chosen = set(ordered[-policy.newest :])
    if policy.every_images is not None:
        first: dict[int, int] = {}
        for step in ordered:
            first.setdefault(step * policy.batch_size // policy.every_images, step)
        chosen |= {step for stretch, step in first.items() if stretch}
    if policy.best and best in ordered:
        chosen.add(best)
    return chosen
