"""Shards: the parts in which a source is read, and the files in which their results are kept.

An input shard is a tar file, a table, or some pictures of a folder. A first pass lists the pictures with captions in
it, a second one decodes them, some thousand at a time. Each result is a compressed file of lines under a digest of all
that it depends on, so what is there is never done again: neither after a kill, nor in a set that has grown.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lcmlora.data.reading.candidates import Candidate, Caption, Rejection
from lcmlora.io.files import atomic_write

ALGORITHM = 1  # raise it when the same files and settings give other lines


class InputShard(NamedTuple):
    """A part of a source that is read by itself.

    name: for people.
    state: text that changes whenever its files do; empty if nobody knows, and it is then read in each run.
    content: what the source needs to read it, as JSON has it.
    """

    name: str
    state: str
    content: Any = None


class Spare(NamedTuple):
    """Files of a shard that nothing was taken from."""

    names: list[str]


Listing = Candidate | Rejection | Spare


class Task(NamedTuple):
    """What a worker does: list the pictures of a shard, or decode these candidates of it.

    key: of the result.
    """

    key: str
    shard: InputShard
    candidates: list[Candidate] | None = None


def digest(*parts: Any) -> str:
    """Returns a key for what depends on these values, which JSON can have."""
    text = json.dumps([ALGORITHM, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def packed(results: Iterable[Listing | bytes]) -> bytes:
    """Returns the compressed lines of a result. The line of a record is there already, as bytes."""
    compressor = zlib.compressobj(1, wbits=31)
    parts = [compressor.compress(each if isinstance(each, bytes) else line_of(each)) for each in results]
    return b"".join([*parts, compressor.flush()])


def line_of(each: Listing) -> bytes:
    plain: list[Any]
    if isinstance(each, Candidate):
        plain = ["candidate", each.key, *each.caption, each.place, each.scores]
    elif isinstance(each, Spare):
        plain = ["spare", each.names]
    else:
        plain = ["rejection", each.name, each.reason, each.place, each.detail, each.rank]
    return json.dumps(plain).encode() + b"\n"


def is_candidate(line: bytes) -> bool:
    return line.startswith(b'["candidate"')


def is_record(line: bytes) -> bool:
    """Returns whether a line is one of a list of pictures."""
    return line.startswith(b"{")


def parsed(line: bytes) -> Listing:
    """Returns what `line_of` wrote."""
    kind, *fields = json.loads(line)
    if kind == "candidate":
        key, text, raw, place, scores = fields
        return Candidate(key, Caption(text, raw), place, scores)
    return Spare(*fields) if kind == "spare" else Rejection(*fields)


class Finished:
    """The results of finished shards in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, key: str) -> bool:
        """Returns whether the result is there, and marks it as used."""
        try:
            os.utime(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, content: bytes) -> None:
        """Keeps what `packed` returned."""
        atomic_write(self._path(key), lambda path: path.write_bytes(content))

    def lines(self, key: str) -> Iterator[bytes]:
        with gzip.open(self._path(key), "rb") as file:
            yield from file

    def remove_unused(self, since: float) -> None:
        """Deletes the results that nothing has used since this time."""
        for path in self._folder.glob("*/*.gz"):
            if path.stat().st_mtime < since:
                path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.gz"
