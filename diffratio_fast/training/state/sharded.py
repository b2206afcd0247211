"""Read and write a state in parts, one per process, with ``torch.distributed.checkpoint``.

Uses its safetensors storage, with names, shapes and offsets in a JSON header. (The default storage contains a
pickle.) Imported only for checkpoints of several processes: the import takes a second.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from diffratio_fast.training.state.run_state import RunState


def stager() -> DefaultStager:
    """Stager that copies states to the same (pinned) CPU memory each time."""
    return DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))


class _Stream:
    """A file that computes a digest of the written bytes."""

    def __init__(self, file: io.IOBase) -> None:
        self.file, self.bytes, self.digest = file, 0, xxhash.xxh3_128()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        self.bytes += len(content)
        self.digest.update(content)
        return cast(int, self.file.write(content))


class _Files(FileSystem):
    """A file system that records sizes and digests of written files in ``files``."""

    def __init__(self, files: dict[str, dict[str, Any]]) -> None:
        self.files = files

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            stream = _Stream(file)
            yield cast(io.IOBase, stream)
            self.files[Path(path).name] = {"bytes": stream.bytes, "xxh3_128": stream.digest.hexdigest()}


def write_part(
    directory: Path, tensors: dict[str, Any], files: dict[str, dict[str, Any]], group: dist.ProcessGroup
) -> None:
    """Write this process's part below ``directory`` and record its file in ``files``.

    A collective operation of ``group``; a failure on one process raises ``OSError`` on all.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    writer.fs = _Files(files)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        raise _cause(failed) from None


def read_parts(directory: Path, state: RunState) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, each in the part that ``state`` has."""
    reader = HuggingFaceStorageReader(str(directory))
    sizes = {
        name: (tuple(about.size), about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }
    tensors = state.blank(sizes)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                tensors, storage_reader=reader, no_dist=True
            )  # each process reads the parts that it needs
    except CheckpointException as failed:
        raise ValueError(str(_cause(failed))) from None
    return tensors


def _cause(failed: CheckpointException) -> OSError:
    """The first failure as an ``OSError``, with its error number if it has one."""
    error = next(iter(failed.failures.values()))[0]
    if isinstance(error, OSError):
        return error
    return OSError(" ".join(str(error).split()))
