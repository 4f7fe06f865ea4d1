"""A function in many processes at the same moment."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from threading import Barrier
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 120.0  # seconds


def at_once(function: Callable[..., T], *arguments: object, count: int = 12) -> list[T]:
    """Returns what a module's function returns in so many processes, which all begin when the last one is there.

    They are forked from a server that has imported the module and has no threads: a process that is forked from one
    that has used torch or MLflow may find a lock held by a thread that it does not have.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(count, context, initializer=_begin, initargs=(context.Barrier(count),)) as pool:
        futures = [pool.submit(function, *arguments) for _ in range(count)]
        return [future.result(_PATIENCE) for future in futures]


def _begin(barrier: Barrier) -> None:
    barrier.wait(_PATIENCE)
