"""Workers: they list and decode shards, in this process or in others, each with decoders of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from lcmlora.config import Data, Launch
from lcmlora.data.preparation.shards import InputShard, Listing, Task, packed
from lcmlora.data.reading.candidates import Candidate, Rejection
from lcmlora.data.reading.tables import PRELOAD
from lcmlora.io.isolation import Processes
from lcmlora.parallel.workers import workers

Results = Callable[[Iterable[Task]], Iterator[tuple[Task, bytes]]]


class ShardedSource(Protocol):
    """What a worker needs of a source; `EncodedPictures` has it (lcmlora/data/sources/source.py)."""

    data: Data

    def shards(self) -> Iterator[InputShard]: ...

    def listed(self, shard: InputShard, processes: Processes) -> Iterator[Listing]: ...

    def examined(self, candidates: list[Candidate], processes: Processes) -> Iterator[bytes | Rejection]: ...


class Worker:
    """Returns the result of a task as `shards.packed` has it."""

    def __init__(self, source: ShardedSource, decoders: int) -> None:
        self._source = source
        self._decoders = decoders
        self._processes = Processes(decoders, preload=PRELOAD)

    def __call__(self, task: Task) -> bytes:
        """Divides the task among the decoders."""
        if task.candidates is None or self._decoders == 1:
            return self.alone(task)
        length = -(-len(task.candidates) // self._decoders)
        parts = [task.candidates[start : start + length] for start in range(0, len(task.candidates), length)]
        with ThreadPoolExecutor(len(parts)) as threads:
            found = threads.map(lambda part: [*self._source.examined(part, self._processes)], parts)
            return packed(each for part in found for each in part)

    def alone(self, task: Task) -> bytes:
        """Does the task with one decoder; several threads may call it."""
        if task.candidates is None:
            return packed(self._source.listed(task.shard, self._processes))
        return packed(self._source.examined(task.candidates, self._processes))

    def close(self) -> None:
        self._processes.close()


def default_decoders() -> int:
    """Returns how many processes or threads of a machine decode pictures: each may take 0.4 GB for a large one, and
    more."""
    return min(8, os.cpu_count() or 1)


@contextmanager
def opened(source: ShardedSource, launch: Launch) -> Iterator[Results]:
    """Yields a function that yields each task with its result, as they are finished."""
    if launch.engine == "local" and launch.processes == 1:
        worker = Worker(source, default_decoders())
        try:
            yield partial(_in_threads, worker.alone, default_decoders())
        finally:
            worker.close()
        return
    with workers(launch, partial(_make, source, launch.processes)) as pool:
        yield pool.results


def _make(source: ShardedSource, processes: int) -> Worker:
    """Returns one of so many workers of a machine."""
    return Worker(source, max(1, default_decoders() // processes))


def _in_threads(work: Callable[[Task], bytes], threads: int, tasks: Iterable[Task]) -> Iterator[tuple[Task, bytes]]:
    """Yields each task with its result; so many are worked on at a time, and as many more are waiting."""
    waiting: dict[Future[bytes], Task] = {}
    pool = ThreadPoolExecutor(threads)
    try:
        for task in tasks:
            waiting[pool.submit(work, task)] = task
            while len(waiting) >= 2 * threads:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl+C waits for no picture


def _finished(waiting: dict[Future[bytes], Task]) -> Iterator[tuple[Task, bytes]]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(future), future.result()
