"""A flow run's output after its worker has died: the worker reads it from a pipe, which nobody reads any more."""

from __future__ import annotations

import contextlib
import contextvars
import os
import select
import threading
from collections.abc import Iterator

from lcmlora.tasks.output import log_line

_OUTPUTS = (1, 2)


@contextlib.contextmanager
def keeping_output_open() -> Iterator[None]:
    """Within the block, writing to standard output or error does not fail when the process that reads it has ended.

    The output is discarded from then on. Prefect's log of the run has its lines.
    """
    read, write = os.pipe()
    watch = threading.Thread(target=contextvars.copy_context().run, args=(_follow, read), daemon=True)
    watch.start()
    try:
        yield
    finally:
        os.close(write)  # which ends the thread
        watch.join()
        os.close(read)


def _follow(ending: int) -> None:
    poll = select.poll()
    for descriptor in _OUTPUTS:
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            poll.register(descriptor, 0)  # errors alone: the other end of a pipe was closed
    poll.register(ending, select.POLLHUP)
    while True:
        broken = [descriptor for descriptor, _ in poll.poll()]
        if ending in broken:
            return
        discard = os.open(os.devnull, os.O_WRONLY)
        for descriptor in broken:
            poll.unregister(descriptor)
            os.dup2(discard, descriptor)
        os.close(discard)
        log_line("the process that started this run has ended; the run goes on by itself")
