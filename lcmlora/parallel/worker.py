"""A worker: it makes a function once, and calls it for each task that the driver deals to it.

COMMAND starts one on this machine. It inherits a connected socket, over which driver and worker send each other pickled
messages; nothing listens, so that nobody else can send any.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lcmlora.errors import UserError

# Not `-m`, by which this module would be `__main__`, and its classes others than the driver's. The number of the socket
# follows.
COMMAND = (sys.executable, "-P", "-c", "from lcmlora.parallel.worker import main; main()")
PARENT = "LCMLORA_DRIVER"  # environment variable: the process id of the driver
PATIENCE = 5.0  # seconds in which a worker that is to end may do so by itself

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Ready:
    """The worker has made its function."""


@dataclass(frozen=True)
class Done:
    """The function has returned."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """The function has raised an error, or the worker has while it made the function."""

    error: Exception
    text: str  # of its traceback

    def raised(self) -> Exception:
        """Returns the error as the driver raises it: a UserError as it is, another one with the worker's traceback."""
        if not isinstance(self.error, UserError):
            self.error.__cause__ = RemoteTraceback(self.text)
        return self.error


class RemoteTraceback(Exception):
    """The traceback of an error that was raised in a worker."""

    def __str__(self) -> str:
        return f"in a worker:\n{super().__str__()}"


class Work:
    """The function of a worker.

    A function with a method `expect` is told of each task as soon as it is dealt, in another thread, while it may still
    be at the task before: so it can read ahead. It is told once, and before it is called.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._expect: Callable[[Any], None] = getattr(function, "expect", lambda task: None)
        self._told = 0  # tasks
        self._telling = threading.Lock()

    def expect(self, number: int, task: Any) -> None:
        """Tells of a task.

        Args:
            number: of the task among those of this worker.
        """
        with self._telling:
            if number == self._told:
                self._expect(task)
                self._told += 1

    def do(self, number: int, task: Any) -> Done | Failed:
        """Returns what became of a task; its number is that of `expect`."""

        def act() -> Done:
            self.expect(number, task)
            return Done(self._function(task))

        return attempt(act)


def attempt(act: Callable[[], Any]) -> Any:
    """Returns what `act` returns, or Failed if it raises."""
    try:
        return act()
    except Exception as error:
        return Failed(_portable(error), traceback.format_exc())


def _portable(error: Exception) -> Exception:
    """Returns the error itself if it can be pickled and read again, else one of the same message."""
    with contextlib.suppress(Exception):
        if type(unpickled(pickle.dumps(error))) is type(error):
            return error
    kind = UserError if isinstance(error, UserError) else RuntimeError
    return kind(str(error) if kind is UserError else f"{type(error).__name__}: {error}")


def end_with_parent(parent: int) -> None:
    """Has Linux kill this process if its parent is killed, which then cannot end it any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent != os.getppid():  # it was killed before that
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    end_with_parent(int(os.environ[PARENT]))
    driver = Connection(int(sys.argv[1]))
    os.set_inheritable(driver.fileno(), False)
    sys.path[:] = unpickled(driver.recv_bytes())
    made = attempt(lambda: Work(unpickled(driver.recv_bytes())()))
    if isinstance(made, Failed):
        driver.send_bytes(pickle.dumps(made))
        return
    tasks: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(driver, made, tasks), daemon=True).start()
    driver.send_bytes(pickle.dumps(Ready()))
    while task := tasks.get():
        driver.send_bytes(pickled(made.do(*task)))


def pickled(outcome: Done | Failed) -> bytes:
    """Returns the bytes of an outcome; those of a failure if its result cannot be pickled."""
    found = attempt(lambda: pickle.dumps(outcome))
    return pickle.dumps(found) if isinstance(found, Failed) else found


def unpickled(content: bytes) -> Any:
    """Returns what a driver or its worker has pickled for the other."""
    return pickle.loads(content)  # noqa: S301 - over an inherited socket, or a Ray cluster whose nodes trust each other


def _receive(driver: Connection, work: Work, tasks: queue.SimpleQueue[tuple[int, Any] | None]) -> None:
    """Takes tasks until the driver has ended, or ends the worker."""
    with contextlib.suppress(EOFError, OSError):
        for number in itertools.count():
            task = unpickled(driver.recv_bytes())
            work.expect(number, task)
            tasks.put((number, task))
    tasks.put(None)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)
