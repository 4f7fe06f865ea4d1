"""Work on untrusted bytes in separate processes, which may hang, crash or fill their memory without harm to the run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool

T = TypeVar("T")
R = TypeVar("R")

SECONDS = 60.0
MEMORY = 4 << 30  # bytes of a process; the largest picture that is let through takes 1.5 GB while it is blended
_AHEAD = 8  # items waiting for each process

TOO_LONG = f"took more than {SECONDS:g} seconds to decode"
CRASHED = "made its decoder crash"
NO_MEMORY = f"took more than {MEMORY >> 30} GiB of memory to decode"


def isolated(
    function: Callable[[T], R],
    items: Sequence[T],
    lost: Callable[[T, str], R],
    workers: int,
    *,
    preload: Sequence[str],
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Iterator[R]:
    """Yields function(item) in order, each from another process.

    Args:
        function: defined at the top level of a module, so that another process can import it.
        lost: returns the substitute for an item whose process crashed or had to be ended, given the reason.
        preload: modules that are imported once, before processes are forked.
        seconds: limit for one item.
        memory: bytes that a process may map. Beyond them it gets a MemoryError.
    """
    waiting: deque[tuple[T, ProcessFuture[R]]] = deque()
    with _pool(workers, preload, memory) as pool:
        try:
            for item in items:
                waiting.append((item, pool.schedule(function, [item], timeout=seconds)))
                if len(waiting) > _AHEAD * workers:
                    yield _result(*waiting.popleft(), lost)
            while waiting:
                yield _result(*waiting.popleft(), lost)
        finally:
            if waiting:
                pool.stop()


class Lost(Exception):
    """A process crashed, or had to be ended; the text is the reason."""


class Processes:
    """Processes for untrusted bytes that stay for many calls, which may come from several threads at a time.

    They are started with the first call, and end with `close`, with the object or with the program.
    """

    def __init__(self, count: int, *, preload: Sequence[str], memory: int = MEMORY) -> None:
        """
        Args:
            preload, memory: as of `isolated`.
        """
        self._pool = _pool(count, preload, memory)
        self._waiting: set[ProcessFuture[Any]] = set()
        self.close = weakref.finalize(self, _end, self._pool, self._waiting)

    def call(self, function: Callable[[T], R], item: T, *, seconds: float = SECONDS) -> R:
        """Returns function(item), from one of the processes. Raises Lost."""

        def lost(item: T, reason: str) -> R:
            raise Lost(reason)

        return self._run(function, item, lost, seconds)

    def pieces(
        self, function: Callable[[T], Piece[T, R]], item: T, lost: Callable[[T, str], Piece[T, R]]
    ) -> Iterator[R]:
        """Yields the results of all pieces of an item, as `in_pieces` does."""
        rest: T | None = item
        while rest is not None:
            piece = self._run(function, rest, lost, SECONDS)
            yield from piece.results
            rest = piece.rest

    def _run(self, function: Callable[[T], R], item: T, lost: Callable[[T, str], R], seconds: float) -> R:
        future = self._pool.schedule(function, [item], timeout=seconds)
        self._waiting.add(future)
        try:
            return _result(item, future, lost)
        finally:
            self._waiting.discard(future)


def _end(pool: ProcessPool, waiting: set[ProcessFuture[Any]]) -> None:
    pool.stop()
    for future in list(waiting):  # else whoever waits for one would wait for ever
        future.cancel()
    pool.join()


class Piece(NamedTuple, Generic[T, R]):
    """The results of the first part of an item, and the rest of the item; None if it is finished."""

    results: list[R]
    rest: T | None


def in_pieces(
    function: Callable[[T], Piece[T, R]],
    items: Iterable[T],
    lost: Callable[[T, str], Piece[T, R]],
    workers: int,
    *,
    preload: Sequence[str],
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Iterator[R]:
    """Yields the results of all pieces of all items in order: function(item), then function(its rest), and so on.

    This reads files of any size, several at once, with bounded time and memory: at most one piece of each of `workers`
    items is held. The arguments are those of `isolated`; the piece that `lost` returns has the rest to go on with.
    """
    remaining = iter(items)
    waiting: deque[tuple[T, ProcessFuture[Piece[T, R]]]] = deque()
    ended = False
    with _pool(workers, preload, memory) as pool:

        def begin(item: T) -> tuple[T, ProcessFuture[Piece[T, R]]]:
            return item, pool.schedule(function, [item], timeout=seconds)

        try:
            while True:
                waiting.extend(begin(item) for item in islice(remaining, workers - len(waiting)))
                if not waiting:
                    break
                piece = _result(*waiting.popleft(), lost)
                if piece.rest is not None:
                    waiting.appendleft(begin(piece.rest))
                yield from piece.results
            ended = True
        finally:
            if not ended:
                pool.stop()


def processes(items: int) -> int:
    """Returns the number of processes for so many files."""
    return max(1, min(items, 8, os.cpu_count() or 1))


def _pool(workers: int, preload: Sequence[str], memory: int) -> ProcessPool:
    from pebble import ProcessPool

    context = multiprocessing.get_context("forkserver")  # fork copies locks that other threads hold
    context.set_forkserver_preload(list(preload))
    return ProcessPool(max_workers=workers, context=context, initializer=_begin, initargs=[memory, dict(os.environ)])


def _result(item: T, future: ProcessFuture[R], lost: Callable[[T, str], R]) -> R:
    from pebble import ProcessExpired

    try:
        return future.result()
    except TimeoutError:
        return lost(item, TOO_LONG)
    except ProcessExpired:
        return lost(item, CRASHED)
    except MemoryError:
        return lost(item, NO_MEMORY)


def _begin(memory: int, environment: dict[str, str]) -> None:
    # The server that processes are forked from has the environment of the day it was started.
    os.environ.clear()
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
