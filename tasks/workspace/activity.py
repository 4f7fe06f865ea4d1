"""Which DVC works in the current folder: the processes in DVC's table of readers and writers, and its lock's holder.

It runs beside DVC and in DVC's own processes, and imports neither DVC nor Prefect.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from lcmlora import masking
from lcmlora.io.parsing import Malformed, as_object, parse_json
from lcmlora.io.terminal import shown
from lcmlora.tasks.dvc_internals import READERS_AND_WRITERS

RUN = "LCMLORA_RUN"  # environment variable of DVC's processes: the name of the Prefect run that started them
COMMAND = "dvc_command.py"  # by which the flow runs DVC
WORDS = ("dvc", COMMAND)  # by which DVC's command line is known
_STAGE = "DVC_STAGE"  # environment variable that DVC gives to a stage's command
_UNSHOWN = ("--wait-for-lock", "--single-item", "-s")  # options of DVC
_COMMAND_LENGTH = 100  # characters


class Entry(NamedTuple):
    """A line of DVC's table: a process that reads or writes a path."""

    path: str  # absolute
    pid: int
    writes: bool


def entries() -> set[Entry]:
    """Returns what DVC's living processes read and write; an entry of a process that has ended does not count."""
    try:
        table = as_object(parse_json(READERS_AND_WRITERS.read_bytes()), str(READERS_AND_WRITERS))
        written, read = table.get("write", {}), table.get("read", {})
        found = {Entry(path, int(info["pid"]), True) for path, info in written.items()}
        found |= {Entry(path, int(info["pid"]), False) for path, infos in read.items() for info in infos}
    except FileNotFoundError:
        return set()
    except (Malformed, AttributeError, KeyError, TypeError, ValueError):  # DVC is writing it; `repair` mends the others
        return set()
    living = {pid for pid in {entry.pid for entry in found} if is_dvc(pid)}
    return {entry for entry in found if entry.pid in living}


def is_dvc(pid: int) -> bool:
    """Returns False if there is no such process, or if it is another program, as far as this can be known."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False
    return any(Path(word).name in WORDS for word in words)


def lock_holder(path: Path) -> int | None:
    """Returns the process that holds the lock on a file, by its own account (else 0); None if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once; DVC tries several times
    except BlockingIOError:
        text = os.pread(descriptor, 20, 0).decode(errors="replace").split()
        return int(text[0]) if text and text[0].isdigit() else 0
    finally:
        os.close(descriptor)
    return None


def command_of(pid: int) -> str:
    """Returns the command line of a DVC in short, such as `dvc repro distill@sdxl`; empty if it cannot be read."""
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return ""
    first = next((n for n, word in enumerate(words) if Path(word).name in WORDS), None)
    if first is not None:
        words = ["dvc", *words[first + 1 :]]
    return shown(masking.text(" ".join(word for word in words if word not in _UNSHOWN)), _COMMAND_LENGTH)


def run_of(pid: int) -> str | None:
    """Returns the name of the Prefect run that a process works for, if this user may know."""
    try:
        return psutil.Process(pid).environ().get(RUN) or None
    except (psutil.Error, OSError):
        return None


def since(pid: int, stage: str | None = None) -> str | None:
    """Returns when a DVC, or the stage's command that it runs, was started: ISO 8601, UTC."""
    try:
        process = psutil.Process(pid)
        started = [process.create_time()]
        if stage is not None:
            started = [c.create_time() for c in process.children(recursive=True) if _works_on(c, stage)] or started
    except psutil.Error:
        return None
    return datetime.fromtimestamp(min(started), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe(pid: int) -> str:
    """Returns how a person finds a process: `dvc push (process 123 of run amber-otter, since 19:35:30 UTC)`."""
    command, run, began = command_of(pid), run_of(pid), since(pid)
    named = f"process {pid}" if pid else "a process that does not say which it is"
    detail = f"{named}{f' of run {shown(run)}' if run else ''}{f', since {began[11:19]} UTC' if began else ''}"
    return f"{command} ({detail})" if command else detail


def overlap(path: str, others: Iterable[str]) -> bool:
    """Returns whether a path is one of the others, or lies in one, or has one in it."""
    return any(Path(path).is_relative_to(other) or Path(other).is_relative_to(path) for other in others)


def _works_on(process: psutil.Process, stage: str) -> bool:
    try:
        return bool(process.environ().get(_STAGE) == stage)
    except (psutil.Error, OSError):
        return False
