"""Batches from the host to a GPU, beside what the GPU is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

Batch = tuple[torch.Tensor, torch.Tensor]


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on a GPU, each copied on a side stream while the one before it is used.

    What is not in pinned memory yet is brought there first.
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
            event.synchronize()  # the copy is one batch old; its pinned buffer goes back to where it is from
            del host
            for tensor in (records, labels):
                tensor.record_stream(torch.cuda.current_stream(device))
            yield records, labels
            del records, labels


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()
