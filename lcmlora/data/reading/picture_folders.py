"""A folder of pictures, on this machine or in a bucket: its files, by their paths below it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from lcmlora.data.reading.candidates import LINKED, LONG_CAPTION, MISSING, UNREADABLE, Unusable
from lcmlora.data.reading.folder_listing import Entry, LinkRule, walk
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.remote import Files


class PictureFolder(Protocol):
    """A folder of pictures.

    path: the folder, as `remote.Files` takes it.
    root: its absolute path; empty in a bucket.
    """

    path: str
    root: str

    def entries(self) -> Iterator[Entry]:
        """Yields the files, as `folder_listing.walk` does."""

    def state(self, entry: Entry) -> tuple[str, int]:
        """Returns a text that changes with the file of an entry, and its size in bytes."""

    def check_readable(self, name: str) -> None:
        """Raises Unusable if there is no such file, or it must not be read. No entry need have the name."""

    def read(self, name: str, limit: int) -> bytes:
        """Returns the file's first bytes, at most one more than the limit. Raises Unusable."""

    def read_small_files(self, names: list[str], sizes: Mapping[str, int], limit: int) -> Iterator[bytes | Unusable]:
        """Yields each file's content, or the reason why it cannot be used."""


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: Path, links: str) -> None:
        self._links = LinkRule(path, links)
        self.path = str(path)
        self.root = str(self._links.root)

    def entries(self) -> Iterator[Entry]:
        return walk(self._links)

    def state(self, entry: Entry) -> tuple[str, int]:
        try:
            status = entry.found.stat() if entry.found else (self._links.root / entry.name).stat()
        except OSError:  # whoever reads it gives the reason
            return "", 0
        return f"{status.st_size} {status.st_mtime_ns}", status.st_size

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

    def read_small_files(self, names: list[str], sizes: Mapping[str, int], limit: int) -> Iterator[bytes | Unusable]:
        for name in names:
            try:
                yield self.read(name, limit)
            except Unusable as reason:
                yield reason


class BucketFolder:
    """A prefix of a bucket."""

    root = ""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._states: dict[str, str] = {}
        self.path = files.path

    def entries(self) -> Iterator[Entry]:
        self._states = self._files.states()
        for name in self._states:
            yield Entry("names", name)

    def state(self, entry: Entry) -> tuple[str, int]:
        state = self._states[entry.name]
        return state, int(json.loads(state)["size"])

    def check_readable(self, name: str) -> None:
        raise Unusable(MISSING)

    def read(self, name: str, limit: int) -> bytes:
        try:
            return self._files.read(name, 0, limit + 1)
        except Unavailable:
            raise
        except UserError:
            raise Unusable(UNREADABLE) from None

    def read_small_files(self, names: list[str], sizes: Mapping[str, int], limit: int) -> Iterator[bytes | Unusable]:
        contents = self._files.read_many([name for name in names if sizes[name] <= limit])
        for name in names:
            yield contents.get(name, Unusable(LONG_CAPTION if sizes[name] > limit else UNREADABLE))
