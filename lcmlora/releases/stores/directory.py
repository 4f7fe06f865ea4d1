"""A store in a directory, of this machine or of a mounted file server."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import urllib.parse
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import temporaries
from lcmlora.io.files import atomic_write, make_folder, sha256_file, sync_folder
from lcmlora.releases.stores.store import Entry, Store, blocks_of, in_blocks, read_small, write_blocks

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)  # of file systems without hard links


class DirectoryStore(Store):
    """Releases in a directory. An object is created by a hard link, which fails if there is one already."""

    form = "a directory"

    def __init__(self, root: Path, key: str = "publish.to", consequence: str = "the release is kept") -> None:
        self._root = root
        self._key = key
        self._consequence = consequence
        self.uri = root.absolute().as_uri()

    @classmethod
    def open(cls, settings: Publish, key: str, consequence: str) -> Self:
        scheme, mark, path = settings.first.partition("://")
        if not mark:
            return cls(Path(settings.first), key, consequence)
        if not path.startswith("/"):
            raise UserError(f"{key}: expected {scheme}:///path, got {settings.first!r}")
        return cls(Path(urllib.parse.unquote(path)), key, consequence)

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        path = self._root / name
        with self._explained(path):
            make_folder(path.parent)
            temporaries.sweep(path.parent)
            with temporaries.file_beside(path) as (temporary, descriptor):
                with os.fdopen(descriptor, "wb", closefd=False) as target:
                    # The bytes are hashed while they are copied: a file that is read twice may change in between.
                    digest = hashlib.sha256()
                    for block in blocks_of(content):
                        digest.update(block)
                        target.write(block)
                    target.flush()
                    os.fsync(descriptor)
                if digest.hexdigest() != sha256:
                    raise UserError(f"{path.name}: changed while it was published; package the release again")
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            sync_folder(path.parent)
        return True

    def create_many(self, files: Mapping[str, tuple[Path | bytes, str]]) -> set[str]:
        """As `Store.create_many`. Objects with the same bytes, such as weights under two names, are one file."""
        created: set[str] = set()
        sources: dict[str, str] = {}  # name by SHA-256
        for name, (content, sha256) in files.items():
            if self._link(sources.get(sha256), name) or self.create(name, content, sha256):
                created.add(name)
            sources.setdefault(sha256, name)
        return created

    def _link(self, source: str | None, name: str) -> bool:
        """Gives a stored file a second name. Returns False where there is one of this name, or no links are made."""
        if source is None:
            return False
        path = self._root / name
        with self._explained(path):
            try:
                os.link(self._root / source, path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, *_NO_LINKS):
                    raise
                return False
            sync_folder(path.parent)
        return True

    def digest(self, name: str, *, reread: bool = False) -> str | None:
        path = self._root / name
        with self._explained(path):
            return sha256_file(path) if path.is_file() else None

    def read(self, name: str) -> tuple[bytes, str] | None:
        path = self._root / name
        with self._explained(path):
            if not path.is_file():
                return None
            with path.open("rb") as file:
                content = read_small(file.read, f"{self.uri}/{name}")
            return content, hashlib.sha256(content).hexdigest()

    def fetch(self, name: str, target: Path, size: int) -> bool:
        path = self._root / name
        with self._explained(path):
            if not path.is_file():
                return False

        def blocks() -> Iterator[bytes]:
            with self._explained(path), path.open("rb") as file:
                yield from in_blocks(file.read)

        write_blocks(blocks(), size, target, f"{self.uri}/{name}")
        return True

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        path = self._root / name
        with self._explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # The lock is a file of its own, since a lock on the pointer would be lost when that is replaced.
            with path.with_name(f".{path.name}.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                current = self.read(name)
                if (current[1] if current else None) != tag:
                    return False
                atomic_write(path, lambda p: p.write_bytes(content))
        return True

    def entries(self, prefix: str) -> list[Entry]:
        folder = self._root / prefix.rpartition("/")[0]
        with self._explained(folder):
            found = []
            for path in folder.rglob("*") if folder.is_dir() else ():
                name = path.relative_to(self._root).as_posix()
                if not path.name.startswith(".") and name.startswith(prefix) and path.is_file():
                    state = path.stat()
                    found.append(Entry(name, state.st_size, datetime.fromtimestamp(int(state.st_mtime), UTC)))
        return sorted(found, key=lambda entry: entry.name)

    def delete(self, name: str) -> None:
        path = self._root / name
        with self._explained(path):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder is not empty, or another process has removed it
                path.parent.rmdir()

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._key}: cannot use {path}: {error.strerror or error}; {self._consequence}"
            ) from error
