"""Work on bytes that nobody vouches for, in processes that may hang, crash or eat memory without harm to the run."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pebble import ProcessFuture

T = TypeVar("T")
R = TypeVar("R")

SECONDS = 60.0
MEMORY = 4 << 30  # bytes of a process; the largest picture that is let through takes 1.5 GB while it is blended
_AHEAD = 8  # items waiting for each process

TOO_LONG = f"took more than {SECONDS:g} seconds to decode"
CRASHED = "made its decoder crash"


def isolated(
    function: Callable[[T], R],
    items: Sequence[T],
    lost: Callable[[T, str], R],
    workers: int,
    *,
    preload: str,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Iterator[R]:
    """Yields function(item) in order, each from another process.

    Args:
        function: of a module, so that another process finds it.
        lost: what stands in for an item whose process ended or had to be ended, with the reason.
        preload: module that processes start with, imported once for all.
        seconds: of one item.
        memory: bytes that a process may map; above, Python's MemoryError is raised in there.
    """
    from pebble import ProcessExpired, ProcessPool

    context = multiprocessing.get_context("forkserver")  # fork copies locks that other threads hold
    context.set_forkserver_preload([preload])
    waiting: deque[tuple[T, ProcessFuture[R]]] = deque()
    with ProcessPool(
        max_workers=workers, context=context, initializer=_begin, initargs=[memory, dict(os.environ)]
    ) as pool:

        def result() -> R:
            item, future = waiting.popleft()
            try:
                return future.result()
            except TimeoutError:
                return lost(item, TOO_LONG)
            except ProcessExpired:
                return lost(item, CRASHED)

        try:
            for item in items:
                waiting.append((item, pool.schedule(function, [item], timeout=seconds)))
                if len(waiting) > _AHEAD * workers:
                    yield result()
            while waiting:
                yield result()
        finally:
            if waiting:
                pool.stop()


def _begin(memory: int, environment: dict[str, str]) -> None:
    # The server that processes are forked from has the environment of the day it was started.
    os.environ.clear()
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
