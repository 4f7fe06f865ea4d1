"""Workers that are processes of this machine. They end with the driver, however that ends."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.parallel.dealing import Died, Event
from lcmlora.parallel.worker import COMMAND, PARENT, PATIENCE, Ready, unpickled

_POLL = 0.2  # seconds between two checks whether a worker has died


class LocalProcesses:
    """Processes of this machine, each with a GPU of its own where there are any (lcmlora.parallel.dealing.Engine)."""

    def __init__(self, count: int, make: Callable[[], Any], device: str) -> None:
        self._make = pickle.dumps(make)
        self._environment = os.environ | {PARENT: str(os.getpid())}
        if "OMP_NUM_THREADS" not in os.environ:
            self._environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
        self._gpus = _gpus(count) if device != "cpu" else []
        self._started = 0
        self._processes: dict[int, _Process] = {}
        self._ready: set[int] = set()  # those that have made their function
        try:
            for place in range(count):
                self._start(place)
        except BaseException:
            self.end(at_once=True)
            raise

    @property
    def size(self) -> int:
        return len(self._processes)

    def give(self, worker: int, task: Any) -> None:
        content = pickle.dumps(task)
        with contextlib.suppress(OSError):  # of one that has died, which is an event
            self._processes[worker].connection.send_bytes(content)

    def events(self) -> list[tuple[int, Event]]:
        connections = {process.connection: number for number, process in self._processes.items()}
        found: list[tuple[int, Event]] = []
        for connection in wait(list(connections), _POLL):
            assert isinstance(connection, Connection)
            with contextlib.suppress(EOFError, OSError):
                found.append((connections[connection], _received(connection)))
        for number, process in list(self._processes.items()):
            if (status := process.popen.poll()) is None:
                continue
            with contextlib.suppress(EOFError, OSError):  # what it sent before it died
                while process.connection.poll():
                    found.append((number, _received(process.connection)))
            found.append((number, Died(_ending(status))))
            self._ready.discard(number)
            process.connection.close()
            del self._processes[number]
            self._start(process.place)
        self._ready |= {number for number, event in found if isinstance(event, Ready)}
        return found

    def end(self, *, at_once: bool) -> None:
        until = time.monotonic() + (0.0 if at_once else PATIENCE)
        for number, process in self._processes.items():
            if at_once or number not in self._ready:
                process.popen.kill()
            process.connection.close()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, until - time.monotonic()))
            process.popen.kill()
            process.popen.wait()
        self._processes.clear()

    def _start(self, place: int) -> None:
        here, there = socket.socketpair()
        with there:
            environment = self._environment | ({"CUDA_VISIBLE_DEVICES": self._gpus[place]} if self._gpus else {})
            # In a session of its own: Ctrl+C goes to the driver alone, which ends its workers.
            popen = subprocess.Popen(
                [*COMMAND, str(there.fileno())],
                env=environment,
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        connection = Connection(here.detach())
        self._processes[self._started] = _Process(place, popen, connection)
        self._started += 1
        with contextlib.suppress(OSError):  # of one that has died, which is an event
            # An empty entry is the current folder, from which nothing is imported there.
            connection.send_bytes(pickle.dumps([entry for entry in sys.path if entry]))
            connection.send_bytes(self._make)


@dataclass(frozen=True)
class _Process:
    place: int  # among the processes that there are at a time, which is the number of its GPU
    popen: subprocess.Popen[bytes]
    connection: Connection


def _received(connection: Connection) -> Event:
    event: Event = unpickled(connection.recv_bytes())
    return event


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    likely = f", {faults.explain_sigkill(faults.verb_of(sys.argv[1:]))}" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{likely}"


def _gpus(count: int) -> list[str]:
    """Returns the GPU of each process, as CUDA_VISIBLE_DEVICES names it; none if there is none.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    import torch

    if not (found := torch.cuda.device_count()):
        return []
    if found < count:
        raise UserError(f"launch.processes: {count} is more than the {found} GPUs of this machine")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else list(map(str, range(found))))[:count]
