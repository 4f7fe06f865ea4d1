"""DVC stages as Prefect tasks: each runs in a process group of its own, which ends when the flow ends."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from lcmlora.errors import UserError

_GRACE = 5.0  # seconds between asking a process group to end and ending it


class StageFailed(UserError):
    """A stage ended with an error; the message is the stage and the last line that says why."""


@dataclass(frozen=True)
class StageResult:
    """What became of one stage."""

    stage: str
    ran: bool  # False: it was up to date, or its outputs came from the cache
    seconds: float


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


@task(task_run_name="stage {stage}", cache_policy=NO_CACHE)
def run_stage(stage: str, processes: Processes, force: bool = False, pull: bool = False) -> StageResult:
    """Runs one DVC stage if it is stale, its output on standard error.

    Args:
        pull: ask the default remote for outputs and former runs before computing.

    Raises:
        StageFailed: with the stage and the last error line.
    """
    began = time.monotonic()
    options = [*(["--force"] if force else []), *(["--pull"] if pull else [])]
    status, lines = _stream(processes, ["repro", "--single-item", *options, stage])
    if status != 0:
        raise StageFailed(f"{stage}: {_reason(lines) or f'dvc ended with status {status}'}")
    ran = any(line.startswith(f"Running stage '{stage}'") for line in lines)
    return StageResult(stage, ran, time.monotonic() - began)


@task(task_run_name="what is stale", cache_policy=NO_CACHE)
def stale(stages: Sequence[str], processes: Processes) -> set[str]:
    """Returns those of the stages that DVC would not skip. A stage after one of them may become stale, too."""
    answer = json.loads(_ask(processes, ["status", "--json", *stages]))
    return set(answer) & set(stages)


@task(task_run_name="default remote", cache_policy=NO_CACHE)
def has_remote(processes: Processes) -> bool:
    """Returns whether DVC has a default remote to pull from."""
    return "core.remote=" in _ask(processes, ["config", "--list"])


def _command(arguments: Sequence[str]) -> dict[str, Any]:
    # Stages call `lcmlora`: the one beside this interpreter, whether or not its environment is activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        "command": [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments],
        "env": os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"},
    }


def _ask(processes: Processes, arguments: Sequence[str]) -> str:
    """Returns the standard output of a short DVC command."""
    with processes.start(**_command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    if process.returncode != 0:
        reason = _reason((out + err).decode(errors="replace").splitlines())
        raise StageFailed(f"dvc {arguments[0]}: {reason or f'ended with status {process.returncode}'}")
    return out.decode()


def _stream(processes: Processes, arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Runs DVC while its output goes to standard error; returns its status, the lines that matter and the last one."""
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
        with processes.start(**_command(arguments), stdout=sink, stderr=sink) as process:
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


def _reason(lines: Sequence[str]) -> str:
    """Returns the stage's own error line, else DVC's, else the last line."""
    for prefix in ("error: ", "ERROR: "):
        for line in reversed(lines):
            if line.startswith(prefix):
                return line.removeprefix(prefix)
    return next((line for line in reversed(lines) if line), "")
