"""Folders that this user alone can write to, for locks and caches of code; and one that all users share, for locks."""

from __future__ import annotations

import os
import platform
import re
import stat
import tempfile
from pathlib import Path

from lcmlora.errors import UserError

DOWNLOADS = "LCMLORA_CACHE"  # environment
LOCKS = "LCMLORA_LOCKS"  # environment

# Where all users may make files, and nobody delete another's. Cleaners of temporary files pass over the first two.
_SHARED = ("/run/lock", "/dev/shm", "/tmp")


def runtime_folder() -> Path:
    """Returns the folder for locks of this user on this machine: below $XDG_RUNTIME_DIR, or else among the caches.

    Raises:
        UserError: there is none that this user alone can write to.
    """
    user = os.getuid()
    for place in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"):
        if place and Path(place).is_absolute() and _fault(Path(place)) is None:
            return _made(Path(place, "lcmlora"))
    return cache_folder("run-" + re.sub(r"[^\w.-]", "_", platform.node()))  # homes may be shared by machines


def shared_folder() -> Path | None:
    """Returns the folder for locks that all users of this machine share; None if there is none.

    It is $LCMLORA_LOCKS, such as a folder that containers share, or else the first of the system's folders that belong
    to root and in which all users may make files, but nobody may delete another's (the sticky bit).

    Raises:
        UserError: LCMLORA_LOCKS is no folder.
    """
    if place := os.environ.get(LOCKS):
        if not Path(place).is_dir():
            raise UserError(f"{LOCKS}: {place}: expected a folder")
        return Path(place)
    for place in _SHARED:
        try:
            found = Path(place).lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and found.st_mode & 0o1002 == 0o1002:
            return Path(place)
    return None


def cache_folder(name: str) -> Path:
    """Returns a folder of this user's caches: below $XDG_CACHE_HOME or ~/.cache.

    If neither can be written, as in a container, it is below the shared temporary folder, provided that this user owns
    it there: another user could have taken its name first.

    Raises:
        UserError: there is none that this user alone can write to.
    """
    try:
        return _made(_caches() / "lcmlora" / name)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        own = _made(Path(tempfile.gettempdir(), f"lcmlora-{os.getuid()}"))
        return _made(own / name)


def _caches() -> Path:
    """Returns the folder of this user's caches, by the XDG base directory specification."""
    place = os.environ.get("XDG_CACHE_HOME", "")
    return Path(place) if Path(place).is_absolute() else Path("~/.cache").expanduser()


def downloads(name: str) -> Path:
    """Returns the folder of this name for downloads, such as bases and adapters: the user's, never the current folder.

    It is below $LCMLORA_CACHE, by default below lcmlora in $XDG_CACHE_HOME or ~/.cache. The folder need not exist.

    Raises:
        UserError: none of the variables is set, and the user has no home.
    """
    if place := os.environ.get(DOWNLOADS):
        return Path(place).absolute() / name
    try:
        return _caches() / "lcmlora" / name
    except RuntimeError:
        raise UserError(
            f"{DOWNLOADS}: is not set, and this user has no home; set it to a folder for downloads"
        ) from None


def _made(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if wrong := _fault(folder):
        raise UserError(
            f"{folder}: {wrong}; remove it, or set XDG_RUNTIME_DIR and XDG_CACHE_HOME to folders that you alone can "
            "write to"
        )
    return folder


def _fault(folder: Path) -> str | None:
    """Returns why others than this user may write to a folder; None if none can."""
    try:
        found = folder.lstat()
    except OSError as error:
        return str(error.strerror)
    if not stat.S_ISDIR(found.st_mode):
        return "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}"
    return "others can write to it" if found.st_mode & 0o022 else None
