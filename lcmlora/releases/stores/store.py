"""The interface of stores of releases, and opening the store of an address.

An object that was created is never overwritten. Only small records, such as pointers, are replaced. Each kind of store
is a class, named by the scheme of its addresses (lcmlora/plugins.py says how to add one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Self

from lcmlora import progress
from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.plugins import STORES

_BLOCK = 1 << 20
_SMALL = 8 << 20  # bytes that `read` takes into memory; a manifest of a thousand files has 0.2 MB
_PROGRESS_FROM = 16  # blocks, MiB; smaller files show no progress


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    name: str  # relative to the store, with slashes
    bytes: int
    time: datetime  # of writing, UTC


class Store(ABC):
    """A place that keeps releases as objects. Their names are relative to the store and have slashes.

    Every method raises Unavailable if the store cannot be reached, and UserError if it refuses.

    form: of addresses of such stores, for messages.
    uri: the address of this store, with the scheme. `open` accepts it.
    """

    form: ClassVar[str]
    uri: str

    @classmethod
    @abstractmethod
    def open(cls, settings: Publish, key: str, consequence: str) -> Self:
        """Returns the store at `settings.to`. Raises UserError if the address does not fit this kind of store.

        Args:
            key: the setting or option that names the store, for messages.
            consequence: of a store that cannot be reached, for messages.
        """

    def prepare(self, model: str) -> None:
        """Makes the store ready for a model's releases, before anything is looked up in it. Idempotent.

        Raises:
            UserError: it must not be used for them.
        """
        return

    @abstractmethod
    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        """Writes a new object, whole or not at all. Returns False if there is one of this name already."""

    def create_many(self, files: Mapping[str, tuple[Path | bytes, str]]) -> set[str]:
        """Writes new objects, given by name with their SHA-256, and returns the names of those that were not there.

        A store whose every change is a step of its history does this in one step.
        """
        return {name for name, (content, sha256) in files.items() if self.create(name, content, sha256)}

    @abstractmethod
    def digest(self, name: str, *, reread: bool = False) -> str | None:
        """Returns the SHA-256 of a stored object, None if there is none.

        Args:
            reread: read the bytes and hash them, instead of trusting the SHA-256 that the server has recorded.
        """

    @abstractmethod
    def read(self, name: str) -> tuple[bytes, str] | None:
        """Returns a small object and its version tag, None if there is none. Raises UserError if it is large."""

    @abstractmethod
    def fetch(self, name: str, target: Path, size: int) -> bool:
        """Downloads an object to the file `target` and shows the progress. Returns False if there is no such object.

        Args:
            size: expected bytes; no more than these are written.

        Raises:
            UserError: the object has more or fewer bytes.
            OSError: the target cannot be written.
        """

    @abstractmethod
    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        """Replaces a small object if it still has this version tag, and returns whether it did.

        Args:
            tag: None for an object that does not exist yet.
        """

    def show(self, name: str) -> None:
        """Shows the release of the channel with this pointer to people who open the store itself. Idempotent.

        A store that people do not look at has nothing to do.
        """
        return

    @abstractmethod
    def entries(self, prefix: str) -> list[Entry]:
        """Returns the objects whose names begin with `prefix`, sorted by name."""

    @classmethod
    def page(cls, address: str, name: str = "") -> str:
        """Returns the address at which a person looks at a release, or at a file of it.

        Args:
            address: of the release in such a store.
        """
        return f"{address.rstrip('/')}/{name}" if name else address

    def delete(self, name: str) -> None:
        """Deletes an object. Does nothing if there is none of this name.

        Raises:
            UserError: this kind of store deletes nothing.
        """
        raise UserError(f"{self.uri}: {self.form} deletes nothing; delete {name} there by other means")

    def link(self, name: str, seconds: int) -> str:
        """Returns an address at which anybody can read the object for so many seconds.

        Raises:
            UserError: this kind of store has no such addresses.
        """
        raise UserError(f"{self.uri}: {self.form} gives no links; they need a release at {STORES.get('s3').form}")


def open_store(
    settings: Publish,
    *,
    key: str = "publish.to",
    consequence: str = "the release is kept, and the next run publishes it",
) -> Store:
    """Returns the store that `publish.to` names. Raises UserError if that is no address of a store.

    Args:
        key, consequence: as for `Store.open`.
    """
    settings = settings.to_one(settings.first)
    scheme = scheme_of(settings.first)
    if scheme not in STORES.names:
        forms = " or ".join(STORES.get(name).form for name in STORES.names)
        raise UserError(f"{key}: expected {forms}, got {settings.first!r}")
    if "{model}" in settings.first:
        raise UserError(f"{key}: {settings.first} names a store for each model; name the model, as MODEL@CHANNEL does")
    opened: Store = STORES.get(scheme).open(settings, key, consequence)
    return opened


def page_of(address: str, name: str = "") -> str:
    """Returns the address at which a person looks at the release with this address, or at a file of it."""
    scheme = scheme_of(address)  # other programs may have recorded any
    page: str = (STORES.get(scheme) if scheme in STORES.names else Store).page(address, name)
    return page


def scheme_of(address: str) -> str:
    """Returns the text before `://` in an address, `file` for a path."""
    scheme, mark, _ = address.partition("://")
    return scheme if mark else "file"


def blocks_of(content: Path | bytes) -> Iterator[bytes]:
    """Yields the bytes, or those of the file, in blocks."""
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        yield from in_blocks(file.read)


def in_blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yields the blocks that `read(size)` returns, until it returns an empty one."""
    while block := read(_BLOCK):
        yield block


def read_small(read: Callable[[int], bytes], place: str) -> bytes:
    """Returns all bytes that `read(size)` returns. Raises UserError if they are too many for a small object."""
    pieces: list[bytes] = []
    for block in in_blocks(read):
        pieces.append(block)
        expect_small(sum(map(len, pieces)), place)
    return b"".join(pieces)


def expect_small(size: int, place: str) -> None:
    """Raises UserError if so many bytes are too many for a small object."""
    if size > _SMALL:
        raise UserError(f"{place}: has more than {_SMALL} bytes, expected a small file; do not use it")


def write_blocks(blocks: Iterable[bytes], size: int, target: Path, place: str) -> None:
    """Writes the blocks to the file and shows the progress. Raises UserError if they have not `size` bytes in all."""
    count, written = -(-size // _BLOCK), 0
    with target.open("wb") as file:
        for block in progress.track(blocks, f"{target.name}, MiB", total=count, quiet=count < _PROGRESS_FROM):
            written += len(block)
            if written > size:
                break
            file.write(block)
    if written != size:
        shown = f"more than {size} bytes" if written > size else f"{written} bytes"
        raise UserError(f"{place}: has {shown}, and {size} are listed; it was changed in the store, do not use it")
