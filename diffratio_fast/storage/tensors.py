"""Writing safetensors files deterministically: same content, same bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from diffratio_fast.storage.writing import replacing


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, root: Path | None = None
) -> None:
    """Write ``tensors`` (contiguous, on the CPU) and ``metadata`` atomically; errors as in ``replacing``.

    The safetensors library writes metadata in random hash order; here they are sorted.
    """
    content = memoryview(safetensors.torch.save(dict(tensors)))
    (length,) = struct.unpack("<Q", content[:8])
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(bytes(content[8 : 8 + length]))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with replacing(path, root=root) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(content[8 + length :])
