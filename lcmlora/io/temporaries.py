"""Temporary files and folders beside their final places, and the removal of those that killed processes left.

Each has a name of its own and is locked (flock) while its process lives. The kernel gives the lock up with the process,
so a leftover is known by a lock that can be taken; process ids say nothing on a file system that machines share. What
another machine made is left alone for a day in any case, since not every network file system passes locks on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_NAME = re.compile(r"\.(?P<target>.+)\.(?P<machine>[0-9a-f]{8})-[0-9a-f]{12}\.(?P<kind>part|former)", re.DOTALL)
_LONGEST = 200  # bytes that a temporary name takes of its target's, since file systems have a limit of 255
_AGE = 86400.0  # seconds after which what another machine made counts as left
_LOOKED_AT = 1000  # entries of a folder; a folder of many thousands is not read whole for each file that is written
_NO_LOCKS = (OSError,)  # what flock raises where a file system has none: ENOLCK, EOPNOTSUPP, EBADF, EINVAL


@cache
def _machine() -> str:
    """Eight digits that name this machine since it was started; locks are sure among processes that share them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:  # not Linux
        boot = os.uname().nodename.encode()
    return hashlib.sha256(boot).hexdigest()[:8]


def name_beside(path: Path, kind: str = "part") -> Path:
    """Returns an unused name beside `path`."""
    shown = os.fsdecode(os.fsencode(path.name)[:_LONGEST])
    return path.with_name(f".{shown}.{_machine()}-{secrets.token_hex(6)}.{kind}")


def is_temporary(path: Path) -> bool:
    """Returns whether the name is that of a temporary file or folder, of a living process or not."""
    return _NAME.fullmatch(path.name) is not None


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[tuple[Path, int]]:
    """Yields a new, empty file beside `path` and its descriptor; what is still there when the block ends is deleted."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = name_beside(path)
        descriptor = os.open(temporary, flags, 0o666)
        if _held(descriptor, temporary):
            break
        os.close(descriptor)
    try:
        yield temporary, descriptor
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """Yields a new, empty folder beside `path`; what is still there when the block ends is deleted.

    Args:
        mode: of the folder, less what the umask takes.
    """
    while True:
        temporary = name_beside(path)
        temporary.mkdir(mode)
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # swept before it could be locked
            continue
        if _held(descriptor, temporary):
            break
        os.close(descriptor)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        remove(temporary)


def _held(descriptor: int, path: Path) -> bool:
    """Locks the file or folder; returns False where a process that sweeps has taken it in the meantime."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except _NO_LOCKS:
        return True
    return _is_at(descriptor, path)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def sweep(folder: Path, limit: int | None = _LOOKED_AT) -> None:
    """Deletes what killed processes left in the folder, and restores a folder that one of them had moved aside.

    Args:
        limit: entries of the folder that are looked at; None looks at all.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, limit) if entry.name.startswith(".")]
    for name in names:
        if match := _NAME.fullmatch(name):
            _sweep(folder / name, match)


def _sweep(path: Path, match: re.Match[str]) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # gone already, a link, or another user's
        return
    try:
        sure = match["machine"] == _machine()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except _NO_LOCKS:
            sure = False
        if not _is_at(descriptor, path) or not (sure or _age(path) > _AGE):
            return
        if match["kind"] == "former":
            with contextlib.suppress(OSError):  # the folder that was to follow is there
                path.rename(path.with_name(match["target"]))
                return
        remove(path)
    finally:
        os.close(descriptor)


def _age(path: Path) -> float:
    """Returns the seconds since a file, or any file in a folder, was last written."""
    newest = path.lstat().st_mtime
    for root, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, Path(root, name).lstat().st_mtime)
    return time.time() - newest


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder; what cannot be deleted is left to the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def lock_of(path: Path) -> Path:
    """Returns the file beside `path` that `locked` locks."""
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:_LONGEST])}.lock")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time work at `path`; others wait. The lock is a file beside it, deleted afterwards.

    On a file system without locks nobody waits, so the lock may save work, but correctness must not depend on it.
    """
    descriptor = _take(lock_of(path))
    try:
        yield
    finally:
        if descriptor is not None:
            lock_of(path).unlink(missing_ok=True)
            os.close(descriptor)


def _take(lock: Path) -> int | None:
    """Takes the lock and returns its descriptor; None if the folder cannot be written, so that nobody works there."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return None
            raise
        try:
            with contextlib.suppress(*_NO_LOCKS):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, lock):  # else the one before has deleted it, and a third one may hold a new one
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
