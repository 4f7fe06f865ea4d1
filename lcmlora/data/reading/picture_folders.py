"""Where the files of a folder of pictures lie, on this machine or in a bucket, by their paths below it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lcmlora.data.reading.candidates import LINKED, LONG_CAPTION, MISSING, UNREADABLE, Unusable
from lcmlora.data.reading.folder_listing import Links, Tree, walk
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.remote import Files


class Place(Protocol):
    """A folder. `path` is how `remote.Files` takes it, `root` its own absolute path, empty in a bucket."""

    path: str
    root: str

    @property
    def tree(self) -> Tree: ...

    def check(self, name: str) -> None:
        """Raises Unusable where there is no such file, or it must not be read; it need not be in the tree."""

    def read(self, name: str, limit: int) -> bytes:
        """Returns the file's first bytes, one more than the limit at most. Raises Unusable."""

    def texts(self, names: list[str], limit: int) -> Iterator[bytes | Unusable]:
        """Yields the contents of small files, or why there is none."""


class Here:
    """A folder of this machine."""

    def __init__(self, path: Path, links: str) -> None:
        self._links = Links(path, links)
        self.path = str(path)
        self.root = str(self._links.root)

    @cached_property
    def tree(self) -> Tree:
        return walk(self._links)

    def check(self, name: str) -> None:
        path = self._links.root / name
        try:
            if not path.is_file():
                raise Unusable(MISSING)
        except (OSError, ValueError):  # a name too long, or with a zero in it
            raise Unusable(MISSING) from None
        if not self._links.allow(path):
            raise Unusable(LINKED)

    def read(self, name: str, limit: int) -> bytes:
        try:
            with (self._links.root / name).open("rb") as file:
                return file.read(limit + 1)
        except OSError:
            raise Unusable(UNREADABLE) from None

    def texts(self, names: list[str], limit: int) -> Iterator[bytes | Unusable]:
        for name in names:
            try:
                yield self.read(name, limit)
            except Unusable as reason:
                yield reason


class Bucket:
    """A prefix of a bucket. Its listing is read once."""

    root = ""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._sizes: dict[str, int] = {}
        self.path = files.path

    @cached_property
    def tree(self) -> Tree:
        self._sizes = self._files.sizes()
        return Tree(names=list(self._sizes))

    def check(self, name: str) -> None:
        if name not in self._sizes:
            raise Unusable(MISSING)

    def read(self, name: str, limit: int) -> bytes:
        try:
            return self._files.read(name, 0, limit + 1)
        except Unavailable:
            raise
        except UserError:
            raise Unusable(UNREADABLE) from None

    def texts(self, names: list[str], limit: int) -> Iterator[bytes | Unusable]:
        found = self._files.read_many([name for name in names if self._sizes[name] <= limit])
        for name in names:
            yield found.get(name, Unusable(LONG_CAPTION if self._sizes[name] > limit else UNREADABLE))
