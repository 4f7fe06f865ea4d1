"""What a run depends on and nobody announces: whether the pictures or a base are still what they were."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from lcmlora.data.reading.folder_listing import Links, walk
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file
from lcmlora.io.remote import Files


def fingerprint(path: Path | str, links: str = "refuse") -> str:
    """Returns a digest that changes when the file's bytes change, or any name, size or time below the folder or bucket.

    A folder's files are not read, so that millions of pictures take a minute; copying it changes the digest.

    Args:
        links: which are followed, as `data.links` has it.

    Raises:
        UserError: there is no such path.
    """
    if "://" in str(path):
        return Files(str(path)).state()
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    known = hashlib.sha256()
    linked = False
    for root, folders, files in os.walk(path):
        folders.sort()
        linked = linked or any(Path(root, name).is_symlink() for name in folders)
        for name in sorted(files):
            found = Path(root, name)
            told = found.lstat()
            linked = linked or stat.S_ISLNK(told.st_mode)
            known.update(
                f"{found.relative_to(path)}\0{told.st_size}\0{told.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
    if linked:  # of what links lead to nothing was told
        for name in walk(Links(path, links)).names:
            told = (path / name).stat()
            known.update(f"{name}\0{told.st_size}\0{told.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return known.hexdigest()
