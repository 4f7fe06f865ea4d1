"""Repairing the files that a killed DVC leaves half-written: it rewrites two of its files in place."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lcmlora.io.files import atomic_write
from lcmlora.project import Project
from lcmlora.tasks.dvc_internals import LOCK, READERS_AND_WRITERS, READERS_AND_WRITERS_LOCK, TEMPORARY, is_lock_file
from lcmlora.tasks.workspace.activity import is_dvc

_LOCK_TIMEOUT = 60.0  # seconds to wait for a running DVC that locks one of these files

_LOCK_FILE = Project().dvc_lock
_COPY = TEMPORARY / "lcmlora-dvc.lock"  # the last whole dvc.lock


def repair() -> None:
    """Makes DVC work again in the current folder after one of its processes was killed. Keeps a copy of dvc.lock.

    A half-written dvc.lock is replaced by the copy, or removed if there is no copy: stages that are missing in it are
    restored from the run-cache. `.dvc/tmp/rwlock` is the table of the processes that read and write each path. If
    another program has the number of such a process by now, DVC would take it for a running DVC, so it is removed. A
    half-written table becomes empty.
    """
    if not TEMPORARY.is_dir():
        return
    if _is_whole(_LOCK_FILE):
        _make_copy()
    elif _LOCK_FILE.exists():
        with _locked(LOCK):
            if not _is_whole(_LOCK_FILE):
                _restore()
    if READERS_AND_WRITERS.exists() and _without_ended(READERS_AND_WRITERS) is not None:
        with _locked(READERS_AND_WRITERS_LOCK):
            text = _without_ended(READERS_AND_WRITERS)
            if text is not None:
                atomic_write(READERS_AND_WRITERS, lambda path: path.write_text(text, encoding="utf-8"))


def _make_copy() -> None:
    text = _LOCK_FILE.read_bytes()
    if not _COPY.exists() or _COPY.read_bytes() != text:
        atomic_write(_COPY, lambda path: path.write_bytes(text))


def _restore() -> None:
    print(f"warning: {_LOCK_FILE} was cut off when DVC was killed; its last state is restored", file=sys.stderr)
    if _is_whole(_COPY):
        text = _COPY.read_bytes()
        atomic_write(_LOCK_FILE, lambda path: path.write_bytes(text))
    else:
        _LOCK_FILE.unlink()


def _is_whole(path: Path) -> bool:
    """Returns whether DVC can read this dvc.lock."""
    try:
        return is_lock_file(path.read_bytes())
    except OSError:
        return False


def _without_ended(table: Path) -> str | None:
    """Returns the table without processes that are no DVC, None where it needs no change."""
    try:
        found = json.loads(table.read_text(encoding="utf-8"))
        writers = {path: info for path, info in found["write"].items() if is_dvc(info["pid"])}
        readers = {path: [info for info in infos if is_dvc(info["pid"])] for path, infos in found["read"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "{}"
    return (
        None
        if (writers, readers) == (found["write"], found["read"])
        else json.dumps({"write": writers, "read": {path: infos for path, infos in readers.items() if infos}})
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds DVC's own lock. If a running DVC keeps it too long, the block goes on without: its file is not cut off."""
    until = time.monotonic() + _LOCK_TIMEOUT
    with path.open("a+") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield
