"""The processes of one start find one another in a store that still holds what earlier starts left there.

torchrun keeps one store over all its restarts, and gives it to every start's processes. A process group made
there reads the addresses of processes that are dead. The count of restarts does not tell starts apart either:
on several nodes only the node with the failure counts it. So the processes agree on a name of their own
first: each announces itself under a new random token, rank 0 proposes the tokens that it has seen, and the
proposal holds once every process has found its own token in it and confirmed it.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from diffratio_fast.errors import UserError

POLL = 0.02
PREFIX = "diffratio/session"


def agree(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that exactly the ``size`` processes of this start have in common; all of them call it.

    ``UserError`` where that takes longer than ``timeout``.
    """
    token = secrets.token_hex(8)
    store.set(f"{PREFIX}/token/{rank}", token)
    deadline = time.monotonic() + timeout.total_seconds()
    proposed: list[str] | None = None
    while time.monotonic() < deadline:
        if rank == 0:
            proposed = _propose(store, size, proposed)
        found = _read(store, f"{PREFIX}/proposal")
        tokens = json.loads(found) if found else []
        if len(tokens) == size and tokens[rank] == token:
            name = "-".join(tokens)
            store.set(f"{PREFIX}/{name}/{rank}", "confirmed")
            if all(store.check([f"{PREFIX}/{name}/{other}"]) for other in range(size)):
                return name
        time.sleep(POLL)
    raise UserError(
        f"not all of the {size} processes came together within {timeout.total_seconds():.0f} s; see the "
        "launcher's messages"
    )


def _propose(store: dist.Store, size: int, before: list[str] | None) -> list[str] | None:
    """Propose the tokens that are there now, if they are others than ``before``; what is proposed."""
    tokens = [_read(store, f"{PREFIX}/token/{rank}") for rank in range(size)]
    if tokens == before or not all(tokens):
        return before
    complete = [token for token in tokens if token]
    store.set(f"{PREFIX}/proposal", json.dumps(complete))
    return complete


def _read(store: dist.Store, key: str) -> str | None:
    """A key's value without waiting for it."""
    return store.get(key).decode() if store.check([key]) else None
