"""Running commands that end with the flow, even if the flow is killed: each has a supervisor process of its own."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import sysconfig
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from lcmlora import masking
from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.io.private import cache_folder
from lcmlora.io.terminal import LINE, note, shown
from lcmlora.tasks import supervisor

_END_TIMEOUT = supervisor.GRACE + 3  # seconds for a supervisor to end its command
_MARK = "LCMLORA_FLOW"  # environment variable: the flow that a process was started by


class Ended(UserError):
    """The flow is ending, so that no command is started or waited for any more."""


@dataclass(frozen=True)
class Command:
    """A command and its environment; without one it inherits that of this process."""

    arguments: Sequence[str]
    environment: Mapping[str, str] | None = None


class Processes:
    """The commands that run at the moment, started from any thread. Leaving the block ends them.

    Args:
        several: commands may run at the same time, so that each line shown begins with the name of its command.
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
            if alive and error is not None and not isinstance(error, Exception):  # a person or a signal
                note("ending the processes that run ...")
            for process in alive:  # all at once, since each may take some seconds to end
                os.close(self._lifelines.pop(process))
        for process in alive:
            self._end(process)

    @property
    def closing(self) -> bool:
        """Whether the block is being left."""
        return self._closing.is_set()

    def pause(self, seconds: float) -> None:
        """Waits. Raises Ended as soon as the block is left."""
        if self._closing.wait(seconds):
            raise Ended("the flow is ending")

    @contextlib.contextmanager
    def lending(self, descriptor: int) -> Iterator[None]:
        """Passes an open file on to supervisors that this thread starts: a lock on it lasts until they have ended."""
        lent = getattr(self._lent, "descriptors", ())
        self._lent.descriptors = (*lent, descriptor)
        try:
            yield
        finally:
            self._lent.descriptors = lent

    @contextlib.contextmanager
    def start(
        self, command: Command, *, stdout: int | None = None, stderr: int | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Starts a command under a supervisor and yields the supervisor. Both end at the latest with the block.

        The supervisor's output is the command's. It ends with the command's status, 128 + N after signal N.

        Args:
            stdout, stderr: as for subprocess.Popen.

        Raises:
            Ended: the Processes were left before.
        """
        process = self._start(command, stdout, stderr)
        try:
            yield process
            process.wait()
        finally:
            with self._lock:
                lifeline = self._lifelines.pop(process, None)
                if lifeline is not None:
                    os.close(lifeline)
            self._end(process)

    def _start(self, command: Command, stdout: int | None, stderr: int | None) -> subprocess.Popen[bytes]:
        supervised = [sys.executable, "-IS", supervisor.__file__, *command.arguments]
        with self._lock:
            if self.closing:
                raise Ended("the flow is ending")
            read, lifeline = os.pipe()
            try:
                lent = getattr(self._lent, "descriptors", ())
                process = subprocess.Popen(
                    supervised,
                    start_new_session=True,
                    stdin=read,
                    stdout=stdout,
                    stderr=stderr,
                    env=command.environment,
                    pass_fds=lent,
                )
            except BaseException:
                os.close(lifeline)
                raise
            finally:
                os.close(read)
            self._lifelines[process] = lifeline
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Waits until a supervisor without a lifeline has ended. If it was killed, its command is killed, too."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT)
        kill_group(process)
        process.wait()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills the processes in the group that this process leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def python(module: str, *arguments: str) -> Command:
    """Returns the command `python -P -m MODULE ARGUMENTS` with this interpreter.

    The project's folder is not searched for modules: it may have files named as a package that is meant. The commands
    beside this interpreter come first.
    """
    return _python("-P", "-m", module, *arguments)


def script(path: str, *arguments: str) -> Command:
    """Returns the command `python -P PATH ARGUMENTS`: the folder of the file is not searched for modules."""
    return _python("-P", path, *arguments)


def _python(*arguments: str) -> Command:
    # DVC's default is a folder that other users can write to, and DVC unpickles files from it.
    site = {"DVC_SITE_CACHE_DIR": os.environ.get("DVC_SITE_CACHE_DIR") or str(cache_folder("dvc"))}
    environment = os.environ | site | {"PATH": search_path(os.environ), "DVC_NO_ANALYTICS": "1"}
    return Command([sys.executable, *arguments], environment)


def search_path(environment: Mapping[str, str]) -> str:
    """Returns PATH with the folders of this interpreter's commands in front.

    Stages call `lcmlora`, which must be that of this installation, even if its environment is not activated. pip puts
    it beside the interpreter, or, with `--user` or on some systems, into a folder of its own.
    """
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    folders = [str(Path(sys.executable).parent), *(sysconfig.get_path("scripts", scheme) for scheme in schemes)]
    first = [folder for folder in folders if Path(folder, "lcmlora").is_file()] or folders[:1]
    return os.pathsep.join(dict.fromkeys([*first, *environment.get("PATH", os.defpath).split(os.pathsep)]))


def end_children_with_this_process() -> None:
    """Makes all processes that are started from now on end with this one, even if it is killed. Works on Linux.

    This is for processes outside Processes, such as the server that Prefect starts for a flow without one.
    """
    os.environ[_MARK] = uuid4().hex
    read, _ = os.pipe()
    command = [sys.executable, "-IS", supervisor.__file__, "--marked", f"{_MARK}={os.environ[_MARK]}"]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, start_new_session=True, stdin=read, stdout=quiet, stderr=quiet)
    os.close(read)  # the other end closes only when this process ends


def stream(
    processes: Processes,
    command: Command,
    *,
    timeout: float | None = None,
    listen: Callable[[str], None] | None = None,
    label: str | None = None,
    expired: Callable[[], bool] | None = None,
    show: bool = True,
) -> tuple[int, list[str]]:
    """Runs a command and shows its output on standard error. Returns its status and its important lines.

    A run that a worker has started shows nothing: its lines are in Prefect's log, which the worker shows.

    Args:
        timeout: seconds after which the command is ended.
        listen: is called with every line. A line that is overwritten, such as a progress bar, counts once, at its end.
        label: the beginning of each line shown, where several commands run at the same time.
        expired: is asked twice a second whether the command should be ended.
        show: False shows nothing.

    Raises:
        Ended: the flow is ending, and the command with it.
        TimeoutError: it took longer than `timeout`, or has expired.
    """
    display = _display(processes, label) if show else _show_nothing
    source, sink = _output_channel(terminal=display is _show_raw and sys.stderr.isatty())
    lines = _Lines()
    until = time.monotonic() + timeout if timeout is not None else None
    try:
        try:
            started = contextlib.ExitStack()
            process = started.enter_context(processes.start(command, stdout=sink, stderr=sink))
        finally:
            os.close(sink)
        with started:
            for block in _blocks(source, process, until, expired):
                text, whole = lines.add(block)
                display(text, whole)
                if listen:
                    for line in whole:
                        listen(line)
    finally:
        os.close(source)
    if processes.closing:
        raise Ended("the flow is ending")
    return process.returncode, lines.important


class _Lines:
    """Divides an output that comes in blocks into lines, and keeps the important ones."""

    _IMPORTANT = re.compile(r"Running stage '|(error|ERROR): ")

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._important: list[str] = []
        self._last = self._rest = ""

    def add(self, block: bytes) -> tuple[str, list[str]]:
        """Returns the block as text, and the lines that end in it, without colours and without empty lines."""
        text = self._decoder.decode(block)
        *lines, self._rest = (self._rest + text).split("\n")
        whole = [line for line in map(_plain, lines) if line]
        self._important += filter(self._IMPORTANT.match, whole)
        self._last = whole[-1] if whole else self._last
        return text, whole

    @property
    def important(self) -> list[str]:
        """Errors and the names of stages that ran, and the last lines."""
        return [*self._important, self._last, _plain(self._rest)]


def _plain(line: str) -> str:
    """Returns a line without colours. A line that was overwritten becomes its last state."""
    states = [state.strip() for state in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).split("\r")]
    return next((state for state in reversed(states) if state), "")


def _display(processes: Processes, label: str | None) -> Callable[[str, list[str]], None]:
    from prefect.runtime import deployment

    def show_labelled(text: str, lines: list[str]) -> None:
        # One write for all lines, so that another thread's lines do not come between.
        sys.stderr.write("".join(f"{label}: {shown(line, LINE)}\n" for line in lines))
        sys.stderr.flush()

    if deployment.id is not None:
        return _show_nothing
    return show_labelled if processes.several and label else _show_raw


def _show_nothing(text: str, lines: list[str]) -> None:
    pass


def _show_raw(text: str, lines: list[str]) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _output_channel(*, terminal: bool) -> tuple[int, int]:
    """Returns the ends to read from and to write to. With `terminal` it is a pseudo-terminal, for progress bars."""
    if not terminal:
        return os.pipe()
    source, sink = os.openpty()
    termios.tcsetwinsize(sink, termios.tcgetwinsize(sys.stderr.fileno()))
    return source, sink


def _blocks(
    source: int, process: subprocess.Popen[bytes], until: float | None, expired: Callable[[], bool] | None
) -> Iterator[bytes]:
    """Yields blocks until all writers have ended. Raises TimeoutError at `until`, a time of time.monotonic()."""
    poll = select.poll()
    poll.register(source, select.POLLIN | select.POLLHUP)
    over = False
    while True:
        if not over and process.poll() is not None:
            over = True
            kill_group(process)  # if the supervisor was killed, others in its group could write for ever
        if poll.poll(0 if over else 500):
            if not (block := _read(source)):
                return
            yield block
        elif over:
            return
        if (until is not None and time.monotonic() > until) or (expired is not None and expired()):
            raise TimeoutError


def _read(source: int) -> bytes:
    try:
        return os.read(source, 1 << 16)
    except OSError:  # a pseudo-terminal raises it when its other end is closed
        return b""


def reason(lines: Sequence[str], status: int) -> str:
    """Returns why a command failed: the stage's own error line, else DVC's, else the signal, else the last line.

    Args:
        lines: the important ones.
        status: of its supervisor: 128 + N if signal N ended the command, negative if the supervisor was killed.
    """
    # DVC's line for a stage that the kernel killed is "failed to run: lcmlora distill emoji, exited with 137".
    killed = next((line for line in lines if re.search(r"exited with (?:-9|137)\b", line)), None)
    for prefix in ("error: ", "ERROR: "):
        for line in reversed(lines):
            if line.startswith(prefix):
                more = f"; {faults.explain_sigkill(faults.verb_of(killed.split()))}" if line == killed else ""
                return shown(masking.text(line.removeprefix(prefix)), LINE) + more
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL:
        return f"was ended by SIGKILL, {faults.explain_sigkill()}"
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    last = next((line for line in reversed(lines) if line), f"ended with status {status}")
    return shown(masking.text(last), LINE)
