"""Keeping the log of a server small while it runs.

A server's output goes to a file that it was started with. A thread of the server itself moves the file aside when it
has become large, and leads the output to a new one: no line is lost, as would be by cutting the file off, and no other
process is needed, whose end would take the server with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
from pathlib import Path

LOG = "LCMLORA_LOG"  # environment: the file
MEGABYTES = 10  # of a log; SeaweedFS counts in them
KEPT = 3  # former files
_SECONDS = 5.0  # between two looks


def keep_small() -> None:
    """Starts the thread, where this process was given a log."""
    if path := os.environ.get(LOG):
        threading.Thread(target=_watch, args=(Path(path),), name="log", daemon=True).start()


def _watch(path: Path) -> None:
    while True:
        time.sleep(_SECONDS)
        # A full disk and the like: the output goes on where it was, and the next look tries again.
        with contextlib.suppress(OSError):
            follow(path, (1, 2), MEGABYTES << 20)


def follow(path: Path, descriptors: tuple[int, ...], limit: int) -> None:
    """Moves the log aside if it has more than `limit` bytes, and leads these descriptors to the present file.

    Several processes may write to one log: each follows what another one has moved, or a person deleted. Descriptors of
    a terminal or a pipe stay as they are.
    """
    rotate(path, limit)
    now = _identity(path.stat()) if path.exists() else None
    found = {each: os.fstat(each) for each in descriptors}
    behind = [each for each, of in found.items() if stat.S_ISREG(of.st_mode) and _identity(of) != now]
    if behind:
        new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for each in behind:
            os.dup2(new, each, inheritable=True)
        os.close(new)


def rotate(path: Path, limit: int = MEGABYTES << 20) -> None:
    """Moves the log aside if it has more than `limit` bytes. The oldest of the former files is dropped."""
    try:
        if path.stat().st_size <= limit:
            return
    except FileNotFoundError:
        return
    names = [path, *_numbered(path)]
    for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
        with contextlib.suppress(FileNotFoundError):
            newer.replace(older)


def tail(path: Path, lines: int = 8, of: str = "") -> str:
    """Returns the last lines of a log, of the one before it where that has been moved aside just now.

    Args:
        of: the regular expression that lines begin with.
    """
    for each in (path, *_numbered(path)[:1]):
        with contextlib.suppress(FileNotFoundError), each.open("rb") as file:
            file.seek(max(0, each.stat().st_size - (64 << 10)))
            found = [line for line in file.read().decode(errors="replace").splitlines() if re.match(of, line)]
            if found:
                return "\n".join(found[-lines:])
    return ""


def _numbered(path: Path) -> list[Path]:
    """Returns the names of former files, the newest first."""
    return [path.with_name(f"{path.name}.{number}") for number in range(1, KEPT + 1)]


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
