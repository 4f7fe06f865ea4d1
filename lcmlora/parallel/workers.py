"""One map over many workers: tasks are dealt to them as they become free, and again where a worker dies.

`launch.engine` says what the workers are: processes of this machine (local_workers.py), or actors of a Ray cluster
(ray_workers.py). With one local process there are none: this process does the tasks itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from lcmlora.config import Launch
from lcmlora.parallel.dealing import IN_HAND, Dealer, Engine, Pool

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def workers(launch: Launch, make: Callable[[], Callable[[T], R]], device: str = "cpu") -> Iterator[Pool[T, R]]:
    """Yields workers, which end with the block.

    Args:
        make: makes the function from a task to its result. Each worker calls it once, on its own device: it loads there
            what all tasks need. A function with a method `expect` is told of each task as soon as it is dealt, while it
            may still be at the one before. With more than one worker, `make`, tasks and results are pickled: let
            `make` be a function of a module, a frozen dataclass with `__call__`, or a functools.partial of one.
        device: as in params.yaml. With other than cpu each worker has a GPU of its own, where there are any.

    Raises:
        UserError: raised by `make`, there are too few GPUs, or Ray's cluster cannot be used.
    """
    if launch.alone:
        yield _ThisProcess(make())
        return
    engine: Engine
    if launch.engine == "ray":
        from lcmlora.parallel.ray_workers import RayActors

        engine = RayActors(launch, make, device)
    else:
        from lcmlora.parallel.local_workers import LocalProcesses

        engine = LocalProcesses(launch.processes, make, device)
    orderly = False
    try:
        yield Dealer(engine)
        orderly = True
    finally:
        engine.end(at_once=not orderly)


class _ThisProcess(Generic[T, R]):
    """No workers: the function is called here, for one task after the other."""

    size = 1

    def __init__(self, function: Callable[[T], R]) -> None:
        self._function = function
        self._expect: Callable[[T], None] = getattr(function, "expect", lambda task: None)

    def results(self, tasks: Iterable[T]) -> Iterator[tuple[T, R]]:
        in_hand: deque[T] = deque()
        for coming in tasks:
            self._expect(coming)
            in_hand.append(coming)
            if len(in_hand) == IN_HAND:
                task = in_hand.popleft()
                yield task, self._function(task)
        for task in in_hand:
            yield task, self._function(task)
