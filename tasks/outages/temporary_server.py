"""The temporary server that Prefect starts for a flow by hand: if it dies, it is started again."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from lcmlora.io.terminal import note
from lcmlora.tasks import prefect_internals

_LOOK = 0.5  # seconds between two looks at the process
_TRIES = 3  # starts in _WHILE seconds, after which the run ends
_WHILE = 120.0


@contextlib.contextmanager
def keeping_temporary_server() -> Iterator[None]:
    """Within the block, Prefect's temporary server is started again when it has died. The flow goes on meanwhile.

    If it dies again and again, the process gets SIGTERM, and the flow ends as if a person had ended it.
    """
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(over, prefect_internals.TemporaryServer()), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(over: threading.Event, server: prefect_internals.TemporaryServer) -> None:
    starts: list[float] = []
    while not over.wait(_LOOK):
        status = server.status()
        if status is None:
            continue
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        now = time.monotonic()
        starts = [start for start in starts if now - start < _WHILE]
        if len(starts) == _TRIES:
            note(f"Prefect's temporary server {how} again, so the run is ended; is the disk full?", "error: ")
            prefect_internals.give_up_waiting()
            os.kill(os.getpid(), signal.SIGTERM)
            return
        note(f"Prefect's temporary server {how}; it is started again, and the run goes on")
        starts.append(now)
        server.start_again()
