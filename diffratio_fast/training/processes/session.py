"""Agreement of the processes of one start on a session name, in a store with entries of earlier starts.

torchrun uses one store for all its restarts. A process group created there would read addresses of dead
processes. The restart count does not distinguish starts either: on several nodes only the node with the
failure counts it. Therefore the processes first agree on a name: each announces a new random token, rank 0
proposes the tokens that it has read, and the proposal is final when every process has found its own token in
it and has confirmed it.
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
    """Agree on a name that exactly the ``size`` processes of this start share; a collective operation.

    Raises ``UserError`` after ``timeout``.
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
        f"only a part of the {size} processes started within {timeout.total_seconds():.0f} s; check the "
        "messages of the launcher"
    )


def _propose(store: dist.Store, size: int, before: list[str] | None) -> list[str] | None:
    """Propose the current tokens if they differ from ``before``; return the proposal."""
    tokens = [_read(store, f"{PREFIX}/token/{rank}") for rank in range(size)]
    if tokens == before or not all(tokens):
        return before
    complete = [token for token in tokens if token]
    store.set(f"{PREFIX}/proposal", json.dumps(complete))
    return complete


def _read(store: dist.Store, key: str) -> str | None:
    """Value of a key, or None; does not wait."""
    return store.get(key).decode() if store.check([key]) else None
