"""Fingerprints of data sets and bases, which change when their files change."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from lcmlora.data.reading.folder_listing import LinkRule, list_folder
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file
from lcmlora.io.remote import Files


def fingerprint(path: Path | str, links: str = "refuse") -> str:
    """Returns a SHA-256 of a file's bytes, or of the names, sizes and modification times below a folder or bucket.

    A folder's files are not read, so millions of pictures take a minute. A copy of a folder has another fingerprint.

    Args:
        links: which links are followed, as in `data.links`.

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
    digest = hashlib.sha256()
    has_links = False
    for root, folders, files in os.walk(path):
        folders.sort()
        has_links = has_links or any(Path(root, name).is_symlink() for name in folders)
        for name in sorted(files):
            file = Path(root, name)
            status = file.lstat()
            has_links = has_links or stat.S_ISLNK(status.st_mode)
            digest.update(_line(file.relative_to(path), status))
    if has_links:  # os.walk has the links, and not what they lead to
        for name in list_folder(LinkRule(path, links)).names:
            digest.update(_line(name, (path / name).stat()))
    return digest.hexdigest()


def _line(name: Path | str, status: os.stat_result) -> bytes:
    return f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
