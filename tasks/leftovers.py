"""What a killed DVC leaves behind and stumbles over the next time: it rewrites two of its files in place."""

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
from tasks import dvc_command
from tasks.dvc_internals import LOCK, READERS_AND_WRITERS, READERS_AND_WRITERS_LOCK, TEMPORARY, is_lock_file

_PATIENCE = 60.0  # seconds to wait for a DVC that is at work on what is to be mended

_LOCK_FILE = Project().dvc_lock
_DVC = ("dvc", Path(dvc_command.__file__).name)  # in its command line
_KEPT = TEMPORARY / "lcmlora-dvc.lock"  # the last whole dvc.lock


def mend() -> None:
    """Makes DVC work again in the current folder after one of its processes was killed; where all is well, keeps it so.

    A half-written dvc.lock is replaced by the last whole one, and where there is none removed: stages that it then does
    not know are restored from the run-cache. `.dvc/tmp/rwlock`, the table of who reads and writes which path, loses
    those whose process number another program has by now, and whom DVC would take to be at work; a half-written one
    becomes empty.
    """
    if not TEMPORARY.is_dir():
        return
    if _is_whole(_LOCK_FILE):
        _keep()
    elif _LOCK_FILE.exists():
        with _locked(LOCK):
            if not _is_whole(_LOCK_FILE):
                _restore()
    if READERS_AND_WRITERS.exists() and _without_gone(READERS_AND_WRITERS) is not None:
        with _locked(READERS_AND_WRITERS_LOCK):
            text = _without_gone(READERS_AND_WRITERS)
            if text is not None:
                atomic_write(READERS_AND_WRITERS, lambda path: path.write_text(text, encoding="utf-8"))


def _keep() -> None:
    text = _LOCK_FILE.read_bytes()
    if not _KEPT.exists() or _KEPT.read_bytes() != text:
        atomic_write(_KEPT, lambda path: path.write_bytes(text))


def _restore() -> None:
    print(f"warning: {_LOCK_FILE} was cut off when DVC was killed; its last state is restored", file=sys.stderr)
    if _is_whole(_KEPT):
        text = _KEPT.read_bytes()
        atomic_write(_LOCK_FILE, lambda path: path.write_bytes(text))
    else:
        _LOCK_FILE.unlink()


def _is_whole(path: Path) -> bool:
    """Returns whether DVC can read this dvc.lock."""
    try:
        return is_lock_file(path.read_bytes())
    except OSError:
        return False


def _without_gone(table: Path) -> str | None:
    """Returns the table without those who are no DVC; None where nothing needs to change."""
    try:
        found = json.loads(table.read_text(encoding="utf-8"))
        writers = {path: info for path, info in found["write"].items() if _may_be_dvc(info["pid"])}
        readers = {path: [info for info in infos if _may_be_dvc(info["pid"])] for path, infos in found["read"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "{}"
    return (
        None
        if (writers, readers) == (found["write"], found["read"])
        else json.dumps({"write": writers, "read": {path: infos for path, infos in readers.items() if infos}})
    )


def _may_be_dvc(pid: int) -> bool:
    """Returns False where it is known that no such process runs, or that it is another program."""
    if not sys.platform.startswith("linux"):
        return True  # DVC itself sees whether it runs
    try:
        return any(Path(word).name in _DVC for word in Path("/proc", str(pid), "cmdline").read_text().split("\0"))
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds DVC's own lock, or goes on without it where a DVC does not give it back: what it holds is not cut off."""
    until = time.monotonic() + _PATIENCE
    with path.open("a+") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield
