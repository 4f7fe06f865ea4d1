"""Source `folder`: pictures with a caption beside each, or with metadata in .jsonl or .csv; here or in a bucket."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from lcmlora.data.candidates import (
    CAPTIONS,
    EMPTY,
    LONG_CAPTION,
    MAX_BYTES,
    MAX_CAPTION,
    MISSING,
    NO_CAPTION,
    NOT_UTF8,
    OUTSIDE,
    SUFFIXES,
    TOO_LARGE,
    TWICE,
    UNREADABLE,
    Candidate,
    Caption,
    Rejection,
    Unusable,
    clean_caption,
    decoded_caption,
    printable,
    scores_in,
)
from lcmlora.data.remote import Files
from lcmlora.errors import Unavailable, UserError

_METADATA = ("metadata.jsonl", "metadata.csv")
_TABLES = (".jsonl", ".csv")

Told = tuple[Caption, dict[str, float]]


class _Store(Protocol):
    """Where the files of a folder lie, by their paths below it."""

    def names(self) -> list[str]: ...

    def check(self, name: str) -> None:
        """Raises Unusable where there is no such file, or it must not be read."""

    def open(self, name: str) -> IO[bytes]: ...

    def read(self, name: str, limit: int) -> bytes:
        """Returns the file's first bytes, one more than the limit at most. Raises Unusable."""

    def captions(self, names: list[str]) -> Iterator[bytes | Unusable]:
        """Yields the contents of small files, or why there is none."""


class _Here:
    """A folder of this machine; nothing that leads out of it is followed."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def names(self) -> list[str]:
        found = (p for p in self._root.rglob("*") if not p.is_dir())
        names = (p.relative_to(self._root) for p in found)
        return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]

    def check(self, name: str) -> None:
        path = self._root / name
        try:
            if not path.is_file():
                raise Unusable(MISSING)
        except (OSError, ValueError):  # a name too long, or with a zero in it
            raise Unusable(MISSING) from None
        if not path.resolve().is_relative_to(self._root):
            raise Unusable(OUTSIDE)
        if printable(str(path)) != str(path):
            raise Unusable(NOT_UTF8)

    def open(self, name: str) -> IO[bytes]:
        if not (self._root / name).resolve().is_relative_to(self._root):
            raise UserError(f"{self._root / name}: is a link out of the folder; put the file itself there")
        return (self._root / name).open("rb")

    def read(self, name: str, limit: int) -> bytes:
        try:
            with (self._root / name).open("rb") as file:
                return file.read(limit + 1)
        except OSError:
            raise Unusable(UNREADABLE) from None

    def captions(self, names: list[str]) -> Iterator[bytes | Unusable]:
        for name in names:
            try:
                self.check(name)
                yield self.read(name, MAX_CAPTION)
            except Unusable as reason:
                yield reason


class _Bucket:
    """A prefix of a bucket. Its listing is read once."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._sizes: dict[str, int] = {}

    def names(self) -> list[str]:
        self._sizes = self._files.sizes()
        return list(self._sizes)

    def check(self, name: str) -> None:
        if name not in self._sizes:
            raise Unusable(MISSING)

    def open(self, name: str) -> IO[bytes]:
        return self._files.open(name)

    def read(self, name: str, limit: int) -> bytes:
        try:
            return self._files.read(name, 0, limit + 1)
        except Unavailable:
            raise
        except UserError:
            raise Unusable(UNREADABLE) from None

    def captions(self, names: list[str]) -> Iterator[bytes | Unusable]:
        small = [name for name in names if self._sizes[name] <= MAX_CAPTION]
        found = self._files.read_many(small)
        for name in names:
            yield found.get(name, Unusable(LONG_CAPTION if self._sizes[name] > MAX_CAPTION else UNREADABLE))


class Folder:
    """A folder with pictures, or the one file of metadata that names them. A place is a path below the folder."""

    def __init__(self, path: str) -> None:
        path = self._path = str(path)
        self._table: str | None = None  # of metadata, where the path is one
        if "://" not in path:
            here = Path(path)
            if here.suffix in _TABLES and here.is_file():
                here, self._table = here.parent, here.name
            elif not here.is_dir():
                raise UserError(
                    f"data.path: {path} is not a folder; source folder needs one with pictures and captions"
                )
            self._store: _Store = _Here(here)
            return
        if path.endswith(_TABLES):
            path, _, self._table = path.rpartition("/")
        self._store = _Bucket(Files(path))

    def candidates(self, scores: Iterable[str] = ()) -> tuple[list[Candidate], list[Rejection]]:
        names = self._store.names()
        tables = [self._table] if self._table else [n for n in names if PurePosixPath(n).name in _METADATA]
        told, rejections = self._metadata(sorted(tables), tuple(scores))
        pictures = set(told)
        if not self._table:
            pictures |= {name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES}
        if not pictures:
            raise UserError(f"{self._path}: no pictures (JPEG, PNG or WebP) in this folder or below it")
        usable = []
        for name in sorted(pictures):
            try:
                self._store.check(name)
                usable.append(name)
            except Unusable as reason:
                rejections.append(Rejection(printable(name), str(reason)))
        told |= self._beside(set(names), [name for name in usable if name not in told], rejections)
        refused = {rejection.name for rejection in rejections}
        bare = [name for name in usable if name not in told and name not in refused]
        if 2 * len(bare) > len(pictures):
            shown = ", ".join(bare[:3]) + (", ..." if len(bare) > 3 else "")
            raise UserError(
                f"{self._path}: {len(bare)} of {len(pictures)} pictures have no caption ({shown}); put it into a .txt "
                "file of the same name, or into metadata.jsonl or metadata.csv with file_name and text"
            )
        rejections += [Rejection(printable(name), NO_CAPTION) for name in bare]
        return [Candidate(name, told[name][0], name, told[name][1]) for name in usable if name in told], rejections

    def read(self, place: str) -> bytes:
        content = self._store.read(place, MAX_BYTES)
        if not 0 < len(content) <= MAX_BYTES:
            raise Unusable(TOO_LARGE if content else EMPTY)
        return content

    def _beside(self, there: set[str], pictures: list[str], rejections: list[Rejection]) -> dict[str, Told]:
        """Returns the captions that stand in a text file beside their picture."""
        files = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in pictures}
        captioned = [name for name in pictures if files[name] in there]
        told = {}
        contents = self._store.captions([files[name] for name in captioned])
        for name, content in zip(captioned, contents, strict=True):
            try:
                if isinstance(content, Unusable):
                    raise content
                caption = decoded_caption(content)
            except Unusable as reason:
                rejections.append(Rejection(printable(name), str(reason)))
                continue
            if caption.text:
                told[name] = (caption, dict[str, float]())
        return told

    def _metadata(self, tables: list[str], scores: tuple[str, ...]) -> tuple[dict[str, Told], list[Rejection]]:
        """Returns what the metadata say of every picture that they name, whether there is such a file or not."""
        told: dict[str, Told] = {}
        rejections = []
        for table in tables:
            for name, text, row in self._rows(table):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(table), name))
                if path.startswith(("../", "/")) or path in ("..", "."):
                    rejections.append(Rejection(printable(name), OUTSIDE))
                elif path in told:
                    rejections.append(Rejection(printable(name), TWICE))
                elif len(text) > MAX_CAPTION:
                    rejections.append(Rejection(printable(name), LONG_CAPTION))
                elif (caption := clean_caption(text)).text:
                    told[path] = (caption, scores_in(row, scores))
        return told, rejections

    def _rows(self, table: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yields the name, the text and all of every row of a metadata file."""
        number = 0
        try:
            with io.TextIOWrapper(self._store.open(table), encoding="utf-8-sig", newline="") as file:
                rows = (
                    csv.DictReader(file)
                    if table.endswith(".csv")
                    else (json.loads(line) for line in file if line.strip())
                )
                for number, row in enumerate(rows, start=1):
                    fields = row if isinstance(row, dict) else {}
                    text = next((fields[key] for key in ("text", *CAPTIONS) if isinstance(fields.get(key), str)), None)
                    if not isinstance(name := fields.get("file_name"), str) or text is None:
                        raise UserError(
                            f"{table}: row {number}: expected texts file_name and text, got {str(row)[:200]}"
                        )
                    yield name, text, fields
        except (ValueError, RecursionError, csv.Error, OSError) as error:  # ValueError: not JSON, or not UTF-8
            raise UserError(f"{table}: cannot be read after row {number}: {error}") from None
