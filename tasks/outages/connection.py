"""A connection of its own to Prefect's server, for threads that must notice at once that the server is away.

Requests that it does not answer can be left to the run, which sends them when the server is back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    Request = Callable[[SyncPrefectClient], object]

_TIMEOUT = 10.0  # seconds for an answer
_left: ContextVar[list[Request] | None] = ContextVar("requests that are left to the run", default=None)


@contextlib.contextmanager
def connection() -> Iterator[SyncPrefectClient]:
    """Yields a client that no other thread uses. Making it asks the server nothing."""
    from prefect.client.orchestration import get_client

    # With settings, it is not the client of the run's engine.
    with get_client(httpx_settings={"timeout": _TIMEOUT}, sync_client=True) as client:
        yield client


@contextlib.contextmanager
def collecting_requests() -> Iterator[list[Request]]:
    """Yields the list of requests that are left to the run within the block."""
    requests: list[Request] = []
    token = _left.set(requests)
    try:
        yield requests
    finally:
        _left.reset(token)


def leave_to_run(request: Request) -> bool:
    """Has a request sent when the server answers again. Returns False outside a run, where nobody would send it."""
    requests = _left.get()
    if requests is None:
        return False
    requests.append(request)
    return True
