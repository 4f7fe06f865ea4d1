"""Locks on files that outlast a cleaner of temporary files, and that users who do not trust each other may share.

A cleaner may delete the file of a lock at any time. Who then makes the file anew locks another file than the one that
is held. Therefore
* whoever has locked a file looks whether it is still the one at its path, and if not, locks that, too;
* whoever holds a lock keeps its file young, and as soon as the file is gone, locks a new one in its place;
* whoever finds a file that is just made waits for a moment, in which that can happen.

A file that users share lies in a folder where everybody may make files and nobody may delete another's. Nothing in it
is believed, and nothing is written into a file of another user: who holds it is what the kernel says.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from lcmlora.errors import UserError
from lcmlora.io.terminal import shown
from lcmlora.tasks.output import Waiting, log_line
from lcmlora.tasks.processes import Processes

_POLL = 0.2  # seconds between two tries of a lock
_KEEP = 0.25  # seconds between two looks at the path of a lock that is held
_SETTLED = 2.0  # seconds for which a new file is left to who may hold the one before
_LOCKS = Path("/proc/locks")  # Linux: which process has locked which file
_YOUNG = 3600.0  # seconds between two updates of the file's time: cleaners delete what is days old
_TRIES = 20  # of opening a file that others delete and make at the same time


class Unusable(UserError):
    """What lies at the path of a shared lock cannot be locked: another user has put it there."""


@contextlib.contextmanager
def holding_lock(
    path: Path, name: str, processes: Processes, *, exposed: bool = False, shared: bool = False
) -> Iterator[None]:
    """Waits for the lock on a file and holds it within the block. Supervisors of the block's commands hold it, too.

    Args:
        name: of the locked thing, for messages.
        exposed: a cleaner may delete the file at any time.
        shared: other users may lock the file, too; it is exposed.

    Raises:
        Unusable: the file is shared, and is a link, a folder or closed to this user.
        UserError: the file cannot be locked.
        Ended: the flow ended while it waited.
    """
    with _Held(path, shared) as held:
        waiting = Waiting()
        while (new := (exposed or shared) and held.is_new()) or not held.take():
            if not new:
                waiting.tell(name, lambda: f"waiting for {name}, held by {held.holder()}")
            processes.pause(_POLL)
        with contextlib.ExitStack() as lent:
            for descriptor in held.descriptors:
                lent.enter_context(processes.lending(descriptor))
            with held.kept():
                yield


class _Held:
    """The lock on the file at a path, and on those that were at this path before and may still be held."""

    def __init__(self, path: Path, shared: bool) -> None:
        self._path = path
        self._shared = shared
        self.descriptors: list[int] = []  # locked, but for the last one while it is waited for
        self._locked = 0
        self._opened = 0.0

    def __enter__(self) -> _Held:
        if not self._shared:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self._path}: cannot be locked: {error.strerror}") from error
        self._open()
        return self

    def _open(self) -> None:
        self.descriptors.append(_open(self._path, self._shared))
        self._opened = time.monotonic()

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def take(self) -> bool:
        """Returns whether the file that lies at the path now could be locked."""
        for _ in range(_TRIES):
            if self._locked < len(self.descriptors):
                try:
                    fcntl.flock(self.descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                self._locked += 1
                self._sign()
            if self._is_at_path():
                return True
            self._open()
        return False

    def is_new(self) -> bool:
        """Returns whether the file was made a moment ago: another may have been held before and deleted."""
        made = os.fstat(self.descriptors[-1]).st_ctime  # which locking does not change, but its owner can at any time
        waited = time.monotonic() - self._opened
        return self._locked < len(self.descriptors) and waited < _SETTLED and 0 <= time.time() - made < _SETTLED

    def holder(self) -> str:
        """Returns who holds the lock that is waited for, for a message."""
        found = os.fstat(self.descriptors[-1])
        pid = _locking(found)
        if pid is None and (not self._shared or found.st_uid == os.getuid()):
            text = os.pread(self.descriptors[-1], 20, 0).decode(errors="replace").strip()
            pid = int(text) if text.isdigit() else None
        return _named(pid) if pid else "a process that cannot be seen from here"

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps the file in place and young within the block."""
        over = threading.Event()
        thread = threading.Thread(target=self._keep, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _keep(self, over: threading.Event) -> None:
        touched = time.monotonic()
        told = False
        while not over.wait(_KEEP):
            try:
                if time.monotonic() - touched > _YOUNG:
                    os.utime(self.descriptors[-1])
                    touched = time.monotonic()
                if not self.take() and not told:
                    log_line(f"warning: {self._path} was deleted while it was held, and is held by {self.holder()} now")
                    told = True
            except (OSError, UserError) as error:
                if not told:
                    log_line(f"warning: {self._path}: cannot be kept in place while it is held: {error}")
                told = True

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptors[-1]), self._path.lstat())
        except FileNotFoundError:
            return False

    def _sign(self) -> None:
        """Writes this process into a file of this user, where the system does not tell who has locked it."""
        found = os.fstat(self.descriptors[-1])
        if not _LOCKS.exists() and found.st_uid == os.getuid() and found.st_nlink == 1:
            os.ftruncate(self.descriptors[-1], 0)
            os.pwrite(self.descriptors[-1], f"{os.getpid()}\n".encode(), 0)


def _open(path: Path, shared: bool) -> int:
    """Returns the opened file at a path, which is made where it is missing."""
    for _ in range(_TRIES):
        try:
            descriptor = _opened(path, 0o666 if shared else 0o600)
        except FileExistsError:  # another made it in this moment
            continue
        except OSError as error:
            raise _unusable(path, shared, str(error.strerror)) from error
        found = os.fstat(descriptor)
        if found.st_nlink == 1 and stat.S_ISREG(found.st_mode):
            return descriptor
        os.close(descriptor)
        if found.st_nlink > 0:  # else it was deleted in this moment
            raise _unusable(path, shared, "has a second name" if stat.S_ISREG(found.st_mode) else "is no file")
    raise _unusable(path, shared, "is deleted again and again")


def _opened(path: Path, mode: int) -> int:
    # Linux refuses O_CREAT on another user's file in a folder of all users, and a pipe would wait for a writer.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)  # enough for a lock of flock
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, mode)
        os.fchmod(descriptor, mode)  # whatever the umask: others keep a shared file young, too
        return descriptor


def _unusable(path: Path, shared: bool, why: str) -> UserError:
    if not shared:
        return UserError(f"{path}: cannot be locked: {why}")
    try:
        owner = f", and belongs to {_user(path.lstat().st_uid)}"
    except OSError:
        owner = ""
    return Unusable(f"{path}: cannot be locked: {why}{owner}")


def _locking(file: os.stat_result) -> int | None:
    """Returns the process that has locked a file with flock, by Linux's own account; None where it cannot be known."""
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    try:
        rows = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return None
    found = [row[4] for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == device]
    return next((int(pid) for pid in found if pid.isdigit() and int(pid) > 0), None)


def _named(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(process.create_time()))
        return f"process {pid} of user {shown(_user(process.uids().real))}, which runs since {since}"
    except psutil.Error:
        return f"process {pid}, which has ended and whose commands are ending"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
