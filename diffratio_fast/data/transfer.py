"""Copies batches from the host to a GPU, overlapped with computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

Batch = tuple[torch.Tensor, torch.Tensor]


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield ``batches`` on ``device``; a side stream copies each batch while the previous one is used.

    Tensors that are not in pinned memory are pinned first.
    """
    side = torch.cuda.Stream(device)
    copies: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event, Batch]] = deque()
    done = False
    while not done or copies:
        while not done and len(copies) < 2:
            found = next(batches, None)
            if found is None:
                done = True
                break
            host = _pinned(found[0]), _pinned(found[1])
            event = torch.cuda.Event()
            with torch.cuda.stream(side):
                copy = host[0].to(device, non_blocking=True), host[1].to(device, non_blocking=True)
                event.record(side)
            copies.append((*copy, event, host))
            del found
        if copies:
            records, labels, event, host = copies.popleft()
            event.synchronize()  # the copy is one batch old; its pinned buffer can return to its ring
            del host
            for tensor in (records, labels):
                tensor.record_stream(torch.cuda.current_stream(device))
            yield records, labels
            del records, labels


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()
