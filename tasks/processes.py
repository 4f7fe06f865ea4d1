"""Commands in process groups of their own, which end when the flow ends."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_GRACE = 5.0  # seconds between asking a process group to end and ending it

Command = dict[str, Any]  # arguments of Processes.start


class Processes:
    """The process groups that are alive now, in whatever thread they were started. Leaving the block ends them."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in list(self._alive):
            self._end(process)

    @contextlib.contextmanager
    def start(self, command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Starts a process as leader of a new group; the group ends when the block ends with an exception."""
        process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, **options)
        self._alive.add(process)
        try:
            yield process
        except BaseException:
            self._end(process)
            raise
        process.wait()
        self._alive.discard(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        # DVC does not pass signals on: the group is what has to end, and the leader going first is not enough.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            until = time.monotonic() + _GRACE
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._alive.discard(process)


def python(module: str, *arguments: str) -> Command:
    """Returns `python -m MODULE ARGUMENTS` with this interpreter and its environment's commands."""
    # Stages call `lcmlora`: the one beside this interpreter, whether or not its environment is activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        "command": [sys.executable, "-m", module, *arguments],
        "env": os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"},
    }


def stream(processes: Processes, command: Command) -> tuple[int, list[str]]:
    """Runs a command while its output goes to standard error; returns its status and the lines that matter."""
    source, sink = os.pipe()
    if sys.stderr.isatty():  # the stage then draws its progress bars
        os.close(source)
        os.close(sink)
        source, sink = os.openpty()
        termios.tcsetwinsize(sink, termios.tcgetwinsize(sys.stderr.fileno()))
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    telling: list[str] = []
    last = rest = ""
    try:
        with processes.start(**command, stdout=sink, stderr=sink) as process:
            os.close(sink)
            while block := _read(source):
                text = decoder.decode(block)
                sys.stderr.write(text)
                sys.stderr.flush()
                *lines, rest = re.split(r"[\r\n]+", rest + text)
                lines = [line for line in map(_plain, lines) if line]
                telling += filter(_TELLING.match, lines)
                last = lines[-1] if lines else last
    finally:
        os.close(source)
    return process.returncode, [*telling, last, _plain(rest)]


_TELLING = re.compile(r"Running stage '|(error|ERROR): ")


def _read(source: int) -> bytes:
    try:
        return os.read(source, 1 << 16)
    except OSError:  # how a pseudo-terminal says that its other end is closed
        return b""


def _plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip()


def reason(lines: Sequence[str]) -> str:
    """Returns the stage's own error line, else DVC's, else the last line."""
    for prefix in ("error: ", "ERROR: "):
        for line in reversed(lines):
            if line.startswith(prefix):
                return line.removeprefix(prefix)
    return next((line for line in reversed(lines) if line), "")
