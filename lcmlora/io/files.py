"""Writing files so that a reader, or a restart after a kill, never sees half of one.

Any number of processes may write to one place at a time: each writes to a temporary file or folder of its own
(temporaries.py), and the last one to finish wins.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lcmlora.errors import UserError
from lcmlora.io import faults, temporaries

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV)  # a file system that cannot exchange


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with an empty file of the same name, syncs it to disk and moves it to `path`.

    The file is in a folder of its own, where libraries leave temporary files of theirs when they are killed.

    Raises:
        OSError: naming `path`, which is then as it was before.
    """
    with naming(path):
        make_folder(path.parent)
        temporaries.sweep(path.parent)
        with temporaries.folder_beside(path, 0o700) as folder:
            temporary = folder / path.name
            with naming(path, temporary), faults.as_oserror(path, temporary):
                mode = _create(temporary)
                write(temporary)
                _finish(temporary, mode)
                temporary.replace(path)
        sync_folder(path.parent)


def _create(path: Path) -> int:
    """Makes an empty file and returns its mode, which is as the umask says."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _finish(path: Path, mode: int) -> None:
    """Syncs a file, which libraries may have replaced by one that the owner alone can read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes the folder and its parents if they are missing. Raises NotADirectoryError if a file has its name."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically, with sorted keys so that equal values are equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that takes its place when the block ends without an error.

    A folder that is there before is exchanged with it in one call, so that there always is one. File systems that
    cannot do this (NFS, some of FUSE) have none for a moment between two renames.

    Raises:
        OSError: naming `path` or a file in it; `path` is then as it was before.
        UserError: `path` is a link, or a folder that cannot be replaced.
    """
    _check_replaceable(path)
    with naming(path):
        make_folder(path.parent)
        temporaries.sweep(path.parent, None)
        former = path.with_name(f".{path.name}.part")  # as earlier versions called what they left
        if former.is_dir():
            temporaries.remove(former)
        with temporaries.folder_beside(path) as temporary:
            with naming(path, temporary), faults.as_oserror(path, temporary):
                yield temporary
                _sync_tree(temporary)
                _put_in_place(temporary, path)
            sync_folder(path.parent)


def make_once(path: Path, is_there: Callable[[], bool], make: Callable[[Path], Any]) -> None:
    """Makes the folder `path` unless it is there; of many processes one makes it, and the others wait for it.

    Args:
        is_there: returns whether `path` has what it should. May raise if something else is in the way.
        make: fills an empty folder, which then takes the place of `path`.

    Raises:
        OSError: as of `atomic_folder`.
    """
    if is_there():
        return
    _check_replaceable(path)
    with naming(path, temporaries.lock_of(path)):
        make_folder(path.parent)
        with temporaries.locked(path):
            if is_there():
                return
            with atomic_folder(path) as folder:
                make(folder)


def _check_replaceable(path: Path) -> None:
    here = Path.cwd()
    if path.name in ("", "..") or path.absolute() in (here, *here.parents):
        raise UserError(f"{path}: is the folder that this runs in or one above it; name a folder in it")
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _put_in_place(folder: Path, path: Path) -> None:
    """Moves a folder to `path`. A folder that was there is exchanged with it, or removed where that cannot be done."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {path.readlink()}, which stays; delete it or name another folder")
    _check_replaceable(path)
    while True:
        try:
            _exchange(folder, path)
            return
        except FileNotFoundError:
            pass  # nothing is there yet
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            _move_aside(folder, path)
            return
        try:
            folder.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another process has just put its own there


def _move_aside(folder: Path, path: Path) -> None:
    """As `_put_in_place`, with two renames. A process that is killed between them leaves the former folder aside,
    and the next one puts it back (temporaries.sweep)."""
    with temporaries.locked(path):
        former = temporaries.name_beside(path, "former")
        with contextlib.suppress(FileNotFoundError):
            path.rename(former)
        try:
            folder.rename(path)
        except OSError:
            if former.exists():
                former.rename(path)
            raise
        temporaries.remove(former)


@cache
def _renameat2() -> Any:
    found = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # of Linux, since glibc 2.28
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return found


def _exchange(one: Path, other: Path) -> None:
    """Exchanges two folders. Raises OSError, with one of _UNABLE where that cannot be done here."""
    call = _renameat2()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            if path.is_symlink():
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk, so that its new entries survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
            raise  # else a file system that syncs no folders
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes OSErrors of the block name `path`, which a person knows, and not the temporary path or none."""
    try:
        yield
    except OSError as error:
        faults.name_path(error, path, temporary)
        raise


@contextlib.contextmanager
def temporary_folder(within: Path | None = None) -> Iterator[Path]:
    """Yields a folder that ends with the block, by default among the machine's temporary files. OSErrors of the block
    without a path name it."""
    with tempfile.TemporaryDirectory(prefix="lcmlora-", dir=within) as folder, naming(Path(folder)):
        yield Path(folder)


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path) -> str:
    """Returns one SHA-256 over the relative names and contents of all files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path, busy: str = "another run works in this folder; wait for it or end it") -> Iterator[Path]:
    """Locks a folder for this process, and makes it if it is missing.

    Raises:
        UserError: another process holds it, an orphan of a killed flow perhaps; `busy` says what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: {busy}") from None
        yield folder


def discard(folder: Path) -> None:
    """Deletes the scratch folder of a run whose result is in place."""
    shutil.rmtree(folder, ignore_errors=True)
