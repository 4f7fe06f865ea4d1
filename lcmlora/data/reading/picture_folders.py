"""A folder of pictures, on this machine or in a bucket: its files, by their paths below it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lcmlora.data.reading.candidates import LINKED, LONG_CAPTION, MISSING, UNREADABLE, Unusable
from lcmlora.data.reading.folder_listing import FolderListing, LinkRule, list_folder
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.remote import Files


class PictureFolder(Protocol):
    """A folder of pictures.

    path: the folder, as `remote.Files` takes it.
    root: its absolute path; empty in a bucket.
    """

    path: str
    root: str

    @property
    def listing(self) -> FolderListing: ...

    def check_readable(self, name: str) -> None:
        """Raises Unusable if there is no such file, or it must not be read. The listing need not have it."""

    def read(self, name: str, limit: int) -> bytes:
        """Returns the file's first bytes, at most one more than the limit. Raises Unusable."""

    def read_small_files(self, names: list[str], limit: int) -> Iterator[bytes | Unusable]:
        """Yields each file's content, or the reason why it cannot be used."""


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path, links: str) -> None:
        self._links = LinkRule(path, links)
        self.path = str(path)
        self.root = str(self._links.root)

    @cached_property
    def listing(self) -> FolderListing:
        return list_folder(self._links)

    def check_readable(self, name: str) -> None:
        path = self._links.root / name
        try:
            if not path.is_file():
                raise Unusable(MISSING)
        except (OSError, ValueError):  # a name too long, or with a zero in it
            raise Unusable(MISSING) from None
        if not self._links.allows(path):
            raise Unusable(LINKED)

    def read(self, name: str, limit: int) -> bytes:
        try:
            with (self._links.root / name).open("rb") as file:
                return file.read(limit + 1)
        except OSError:
            raise Unusable(UNREADABLE) from None

    def read_small_files(self, names: list[str], limit: int) -> Iterator[bytes | Unusable]:
        for name in names:
            try:
                yield self.read(name, limit)
            except Unusable as reason:
                yield reason


class BucketFolder:
    """A prefix of a bucket. It is listed once."""

    root = ""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._sizes: dict[str, int] = {}
        self.path = files.path

    @cached_property
    def listing(self) -> FolderListing:
        self._sizes = self._files.sizes()
        return FolderListing(names=list(self._sizes))

    def check_readable(self, name: str) -> None:
        if name not in self._sizes:
            raise Unusable(MISSING)

    def read(self, name: str, limit: int) -> bytes:
        try:
            return self._files.read(name, 0, limit + 1)
        except Unavailable:
            raise
        except UserError:
            raise Unusable(UNREADABLE) from None

    def read_small_files(self, names: list[str], limit: int) -> Iterator[bytes | Unusable]:
        contents = self._files.read_many([name for name in names if self._sizes[name] <= limit])
        for name in names:
            yield contents.get(name, Unusable(LONG_CAPTION if self._sizes[name] > limit else UNREADABLE))
