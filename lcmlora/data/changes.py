"""What a run depends on and nobody announces: whether the pictures or a base are still what they were."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from lcmlora.config import Base
from lcmlora.data.reading.tree import Links, walk
from lcmlora.errors import Unavailable, UserError
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


def base_state(name: str, base: Base) -> str:
    """Returns a local base's fingerprint, or the commit at which the hub's repository is now; with that of its style.

    Raises:
        Unavailable: the hub does not answer.
        UserError: there is no such folder, file or repository.
    """
    if base.style is not None:
        plain = base_state(name, base.model_copy(update={"style": None}))
        return f"{plain} {fingerprint(Path(base.style.source))}"
    if base.revision is None:
        return fingerprint(Path(base.source))
    from httpx2 import HTTPError  # which the hub's client does not turn into an error of its own
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        head = HfApi().model_info(base.source, timeout=30).sha
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(f"bases.{name}: {base.source}: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError) as error:
        raise Unavailable(f"bases.{name}: the hub does not answer: {' '.join(str(error).split())}") from error
    return str(head)
