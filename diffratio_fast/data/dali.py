"""The DALI loader: the batches of the native loader, passed through a DALI pipeline.

``external_source`` requests batch number ``start + iteration`` with a stateless callback, so DALI's own
checkpoints work too. The native ``ReadAhead`` reads the records ahead of the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from diffratio_fast.data.native import Batch, ReadAhead, Reading
from diffratio_fast.data.records import Records
from diffratio_fast.data.sampler import Order
from diffratio_fast.errors import UserError


def build_pipeline(
    source: ReadAhead,
    records: Records,
    order: Order,
    start: int,
    device: torch.device,
    *,
    depth: int = 2,
    checkpoint: bytes | None = None,
) -> Any:
    """Build a DALI pipeline with outputs (records, labels) on ``device``, starting at batch ``start``.

    ``depth`` is the prefetch queue depth. ``checkpoint`` is a checkpoint of a pipeline built with the same
    arguments. Raises ``UserError`` if DALI is not installed.
    """
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise UserError(
            f"--loader dali: NVIDIA DALI is not installed ({error}); install diffratio_fast[dali], or use "
            "--loader native"
        ) from None
    end = order.batches

    def callback(info: Any) -> tuple[np.ndarray, np.ndarray]:
        batch = start + info.iteration
        if end is not None and batch >= end:
            raise StopIteration
        read, labels = source.read(batch)
        if not len(labels):  # DALI has no empty batch; only the last one can be empty
            raise StopIteration
        return read, np.ascontiguousarray(labels)

    dtypes: Any = types.DALIDataType
    stored = {"image": dtypes.UINT8, "latent_moments": dtypes.FLOAT16}[records.manifest.kind]
    pipeline = Pipeline(
        batch_size=order.local,
        num_threads=1,
        device_id=_gpu(device),
        prefetch_queue_depth=depth,
        enable_checkpointing=True,
        checkpoint=checkpoint,
    )
    with pipeline:
        outputs = fn.external_source(
            source=callback,
            batch=True,
            batch_info=True,
            num_outputs=2,
            dtype=[stored, dtypes.INT64],
            ndim=[3, 0],
        )
        pipeline.set_outputs(*(o.gpu() if device.type == "cuda" else o for o in outputs))
    pipeline.build()
    return pipeline


def dali_batches(
    records: Records, order: Order, start: int, reading: Reading, device: torch.device
) -> Iterator[Batch]:
    """(records [b, C, H, W], labels int64 (b,)) on ``device``, starting at batch number ``start``."""
    source = ReadAhead(records, order, start, reading)
    try:
        pipeline = build_pipeline(source, records, order, start, device)
        side = torch.cuda.Stream(device) if device.type == "cuda" else None
        batch = start
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                break
            yield _to_torch(outputs[0], device, side), _to_torch(outputs[1], device, side)
            batch += 1
        while (
            order.batches is not None and batch < order.batches
        ):  # this rank's empty slice of the last batch
            read, labels = source.read(batch)
            yield torch.from_numpy(read).to(device), torch.from_numpy(labels).to(device)
            batch += 1
    finally:
        source.close()


def _gpu(device: torch.device) -> int | None:
    """DALI's device ID: an integer, or None for the CPU."""
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _to_torch(output: Any, device: torch.device, side: torch.cuda.Stream | None) -> torch.Tensor:
    """Copy ``output`` to a new tensor: DALI reuses its buffers in the next run."""
    if side is None:
        return torch.from_numpy(output.as_array())  # as_array copies
    from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type

    dense = output.as_tensor()
    with torch.cuda.stream(side):
        tensor = torch.empty(dense.shape(), dtype=to_torch_type[dense.dtype], device=device)
        feed_ndarray(dense, tensor, cuda_stream=side)
    side.synchronize()  # waits for this copy only, not for the training stream
    tensor.record_stream(torch.cuda.current_stream(device))
    return tensor
