"""What a store of releases is, and the one that an address names. What was created is never overwritten; small pointers
are swapped.

Each kind of store is a class, named by the scheme of its addresses (lcmlora/plugins.py says how one is added).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Self

from lcmlora import progress
from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.plugins import STORES

_BLOCK = 1 << 20
_SMALL = 8 << 20  # bytes of what `read` takes into memory; a manifest of a thousand files has 0.2 MB
_SHOWN = 16  # blocks, MiB: a file from this size on shows its progress


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    name: str  # relative to the store, with slashes
    bytes: int
    time: datetime  # when it was written, UTC


class Store(ABC):
    """Where releases lie. Names are relative and use slashes; nothing that was created is ever overwritten.

    Every method raises Unavailable where the store cannot be reached, UserError where it refuses.

    form: of its addresses, for messages.
    uri: its address, with the scheme; what it leads to can be opened by it again.
    """

    form: ClassVar[str]
    uri: str

    @classmethod
    @abstractmethod
    def open(cls, settings: Publish, key: str, consequence: str) -> Self:
        """Returns the store at `settings.to`. Raises UserError where that is no address of one.

        Args:
            key, consequence: what messages say of who named the store, and of what follows where it cannot be reached.
        """

    @abstractmethod
    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        """Writes a new object whole or not at all; returns False where one of this name is already there."""

    @abstractmethod
    def digest(self, name: str, *, reread: bool = False) -> str | None:
        """Returns the SHA-256 of the stored object, None where there is none.

        Args:
            reread: hash the bytes that are there now, whatever the server noted when they were written.
        """

    @abstractmethod
    def read(self, name: str) -> tuple[bytes, str] | None:
        """Returns a small object and its version tag, None where there is none. Raises UserError where it is large."""

    @abstractmethod
    def fetch(self, name: str, target: Path, size: int) -> bool:
        """Writes the object to the file `target`, with its progress; returns False where there is none.

        Args:
            size: bytes that it should have; not more than these are written.

        Raises:
            UserError: it has more or fewer bytes.
            OSError: the target cannot be written.
        """

    @abstractmethod
    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        """Replaces a small object if its tag still is `tag` (None: if there is none); returns whether it did."""

    @abstractmethod
    def entries(self, prefix: str) -> list[Entry]:
        """Returns the objects whose names begin with `prefix`, in the order of their names."""

    def link(self, name: str, seconds: int) -> str:
        """Returns an address at which anybody can read the object for so long. Raises UserError where there is none."""
        raise UserError(f"{self.uri}: {self.form} gives no links; they need a release at {STORES.get('s3').form}")


def open_store(
    settings: Publish,
    *,
    key: str = "publish.to",
    consequence: str = "the release is kept, and the next run publishes it",
) -> Store:
    """Returns the store that `publish.to` names. Raises UserError where it names none.

    Args:
        key, consequence: as for `Store.open`.
    """
    scheme = scheme_of(settings.to)
    if scheme not in STORES.names:
        forms = " or ".join(STORES.get(name).form for name in STORES.names)
        raise UserError(f"{key}: expected {forms}, got {settings.to!r}")
    opened: Store = STORES.get(scheme).open(settings, key, consequence)
    return opened


def scheme_of(address: str) -> str:
    """Returns what stands before `://`; `file` for a path."""
    scheme, mark, _ = address.partition("://")
    return scheme if mark else "file"


def blocks_of(content: Path | bytes) -> Iterator[bytes]:
    """Yields the bytes, or those of the file."""
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        yield from in_blocks(file.read)


def in_blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yields all that `read(size)` returns until it returns nothing."""
    while block := read(_BLOCK):
        yield block


def read_small(read: Callable[[int], bytes], place: str) -> bytes:
    """Returns all that `read(size)` returns. Raises UserError where that is more than a small object has."""
    pieces: list[bytes] = []
    for block in in_blocks(read):
        pieces.append(block)
        if sum(map(len, pieces)) > _SMALL:
            raise UserError(f"{place}: has more than {_SMALL} bytes, expected a small file; do not use it")
    return b"".join(pieces)


def write_blocks(blocks: Iterable[bytes], size: int, target: Path, place: str) -> None:
    """Writes the blocks to the file and shows progress. Raises UserError where they have not `size` bytes in all."""
    count, written = -(-size // _BLOCK), 0
    with target.open("wb") as file:
        for block in progress.track(blocks, f"{target.name}, MiB", total=count, quiet=count < _SHOWN):
            written += len(block)
            if written > size:
                break
            file.write(block)
    if written != size:
        shown = f"more than {size} bytes" if written > size else f"{written} bytes"
        raise UserError(f"{place}: has {shown}, and {size} are listed; it was changed in the store, do not use it")
