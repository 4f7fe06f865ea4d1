"""Commands that end when the flow ends, however it ends: each has a supervisor, which holds on to nothing else."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from lcmlora import masking
from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.io.private import cache_folder
from lcmlora.io.terminal import LINE, shown
from tasks import supervisor

_PATIENCE = supervisor.GRACE + 3  # seconds for a supervisor to end what it watches
_MARK = "LCMLORA_FLOW"  # environment: which flow a process was started by

Command = dict[str, Any]  # arguments of Processes.start


class Ended(UserError):
    """The flow is ending: nothing more is started, and nothing is waited for."""


class Processes:
    """The commands that run now, in whatever thread they were started. Leaving the block ends them.

    Args:
        several: many may run at once, so that each line shown is marked with what it comes from.
    """

    def __init__(self, several: bool = False) -> None:
        self.several = several
        self._lifelines: dict[subprocess.Popen[bytes], int] = {}  # ends of the pipes that supervisors read from
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._lent = threading.local()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._closing.set()
            alive = list(self._lifelines)
            for process in alive:  # all at once, for each may take its grace
                os.close(self._lifelines.pop(process))
        for process in alive:
            self._end(process)

    @property
    def closing(self) -> bool:
        """Whether the block is being left."""
        return self._closing.is_set()

    def pause(self, seconds: float) -> None:
        """Returns after so long. Raises Ended as soon as the block is left."""
        if self._closing.wait(seconds):
            raise Ended("the flow is ending")

    @contextlib.contextmanager
    def lending(self, descriptor: int) -> Iterator[None]:
        """Lets supervisors that this thread starts hold an open file, and so the lock on it, until all is ended."""
        lent = getattr(self._lent, "descriptors", ())
        self._lent.descriptors = (*lent, descriptor)
        try:
            yield
        finally:
            self._lent.descriptors = lent

    @contextlib.contextmanager
    def start(self, command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Starts a command under a supervisor, which is what is yielded; both end at the latest with the block.

        The supervisor has the command's output and ends with its status, 128 + N where signal N ended the command.

        Raises:
            Ended: Processes was left before.
        """
        process = self._start(command, options)
        try:
            yield process
            process.wait()
        finally:
            with self._lock:
                lifeline = self._lifelines.pop(process, None)
                if lifeline is not None:
                    os.close(lifeline)
            self._end(process)

    def _start(self, command: Sequence[str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
        watched = [sys.executable, "-IS", supervisor.__file__, *command]
        with self._lock:
            if self.closing:
                raise Ended("the flow is ending")
            read, lifeline = os.pipe()
            try:
                lent = getattr(self._lent, "descriptors", ())
                process = subprocess.Popen(watched, start_new_session=True, stdin=read, pass_fds=lent, **options)
            except BaseException:
                os.close(lifeline)
                raise
            finally:
                os.close(read)
            self._lifelines[process] = lifeline
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when a supervisor without a lifeline has ended; what it left, being killed itself, is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        kill_rest(process)
        process.wait()


def kill_rest(process: subprocess.Popen[bytes]) -> None:
    """Kills whoever is in the group that this process leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def python(module: str, *arguments: str) -> Command:
    """Returns `python -m MODULE ARGUMENTS` with this interpreter and its environment's commands."""
    return _python("-m", module, *arguments)


def script(path: str, *arguments: str) -> Command:
    """Returns the same for a file, whose folder is not searched for modules."""
    return _python("-P", path, *arguments)


def _python(*arguments: str) -> Command:
    # Stages call `lcmlora`: the one beside this interpreter, whether or not its environment is activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # DVC's own choice is a folder of all users, who could exchange what it unpickles from there.
    site = {"DVC_SITE_CACHE_DIR": os.environ.get("DVC_SITE_CACHE_DIR") or str(cache_folder("dvc"))}
    return {
        "command": [sys.executable, *arguments],
        "env": os.environ | site | {"PATH": path, "DVC_NO_ANALYTICS": "1"},
    }


def mark() -> None:
    """Lets all that this process starts from now on end with it, even where it is killed; on Linux.

    For what is not started by Processes: a process that runs a flow without a server has Prefect start one.
    """
    os.environ[_MARK] = uuid4().hex
    read, _ = os.pipe()
    watching = [sys.executable, "-IS", supervisor.__file__, "--marked", f"{_MARK}={os.environ[_MARK]}"]
    quiet = subprocess.DEVNULL
    subprocess.Popen(watching, start_new_session=True, stdin=read, stdout=quiet, stderr=quiet)
    os.close(read)  # nothing ever closes the other end but this process's end


def stream(
    processes: Processes,
    command: Command,
    *,
    timeout: float | None = None,
    listen: Callable[[str], None] | None = None,
    label: str | None = None,
) -> tuple[int, list[str]]:
    """Runs a command while its output goes to standard error; returns its status and the lines that matter.

    A run that a worker started shows nothing on standard error: its lines are in Prefect's log, and so on the worker's.

    Args:
        timeout: seconds after which it is ended.
        listen: is given every line; of one that was written over, the last state.
        label: what the lines shown begin with where several commands run at once.

    Raises:
        Ended: the flow is ending, and the command with it.
        TimeoutError: it took longer than `timeout`.
    """
    show = _shown(processes, label)
    source, sink = _channel(terminal=show is _raw and sys.stderr.isatty())
    lines = _Lines()
    until = time.monotonic() + timeout if timeout is not None else None
    try:
        try:
            started = contextlib.ExitStack()
            process = started.enter_context(processes.start(**command, stdout=sink, stderr=sink))
        finally:
            os.close(sink)
        with started:
            for block in _blocks(source, process, until):
                text, whole = lines.add(block)
                show(text, whole)
                if listen:
                    for line in whole:
                        listen(line)
    finally:
        os.close(source)
    if processes.closing:
        raise Ended("the flow is ending")
    return process.returncode, lines.telling


class _Lines:
    """The lines of an output that comes in blocks, and those of them that say what happened."""

    _TELLING = re.compile(r"Running stage '|(error|ERROR): ")

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._telling: list[str] = []
        self._last = self._rest = ""

    def add(self, block: bytes) -> tuple[str, list[str]]:
        """Returns the block as text, and the lines that it ended, without colours and not empty."""
        text = self._decoder.decode(block)
        *lines, self._rest = (self._rest + text).split("\n")
        whole = [line for line in map(_plain, lines) if line]
        self._telling += filter(self._TELLING.match, whole)
        self._last = whole[-1] if whole else self._last
        return text, whole

    @property
    def telling(self) -> list[str]:
        """The lines that tell of errors and of stages that ran, and the last ones."""
        return [*self._telling, self._last, _plain(self._rest)]


def _plain(line: str) -> str:
    """Returns a line without colours, and of one that was written over only what was seen at its end."""
    states = [state.strip() for state in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).split("\r")]
    return next((state for state in reversed(states) if state), "")


def _shown(processes: Processes, label: str | None) -> Callable[[str, list[str]], None]:
    from prefect.runtime import deployment

    def labelled(text: str, lines: list[str]) -> None:
        # One write for all, so that another thread's lines do not come between.
        sys.stderr.write("".join(f"{label}: {shown(line, LINE)}\n" for line in lines))
        sys.stderr.flush()

    if deployment.id is not None:
        return lambda text, lines: None
    return labelled if processes.several and label else _raw


def _raw(text: str, lines: list[str]) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _channel(*, terminal: bool) -> tuple[int, int]:
    """Returns the ends to read from and to write to: of a pseudo-terminal where progress bars are wanted."""
    if not terminal:
        return os.pipe()
    source, sink = os.openpty()
    termios.tcsetwinsize(sink, termios.tcgetwinsize(sys.stderr.fileno()))
    return source, sink


def _blocks(source: int, process: subprocess.Popen[bytes], until: float | None) -> Iterator[bytes]:
    """Yields what comes until all who can write have ended; raises TimeoutError at `until`, a monotonic time."""
    poll = select.poll()
    poll.register(source, select.POLLIN | select.POLLHUP)
    over = False
    while True:
        if not over and process.poll() is not None:
            over = True
            kill_rest(process)  # else there may be some, where the supervisor was killed, who write for ever
        if poll.poll(0 if over else 500):
            if not (block := _read(source)):
                return
            yield block
        elif over:
            return
        if until is not None and time.monotonic() > until:
            raise TimeoutError


def _read(source: int) -> bytes:
    try:
        return os.read(source, 1 << 16)
    except OSError:  # how a pseudo-terminal says that its other end is closed
        return b""


def reason(lines: Sequence[str], status: int) -> str:
    """Returns why a command failed: the stage's own error line, else DVC's, else the signal, else the last line.

    Args:
        status: of its supervisor (128 + N where signal N ended the command), or negative where that was killed.
    """
    # What DVC says of a stage that the kernel killed: "failed to run: lcmlora distill emoji, exited with 137".
    killed = next((line for line in lines if re.search(r"exited with (?:-9|137)\b", line)), None)
    for prefix in ("error: ", "ERROR: "):
        for line in reversed(lines):
            if line.startswith(prefix):
                more = f"; {faults.killed(faults.verb_of(killed.split()))}" if line == killed else ""
                return shown(masking.text(line.removeprefix(prefix)), LINE) + more
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL:
        return f"was ended by SIGKILL, {faults.killed()}"
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    last = next((line for line in reversed(lines) if line), f"ended with status {status}")
    return shown(masking.text(last), LINE)
