"""Source `parquet`: tables with a caption and the bytes of a picture in each row (LAION's names of columns are known).

Addresses are not fetched: tools like img2dataset do that, and write tables or tar files that can be read here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from lcmlora.config import Data
from lcmlora.data.reading.candidates import (
    CAPTIONS,
    EMPTY,
    MAX_BYTES,
    NO_CAPTION,
    TOO_LARGE,
    UNREADABLE,
    Candidate,
    Caption,
    Rejection,
    Unusable,
    decoded_caption,
    scores_in,
)
from lcmlora.data.reading.parquet_files import (
    CORRUPT,
    ParquetTable,
    Position,
    RowAt,
    has_bytes,
    is_bytes,
    is_text,
    lost,
    read_piece,
    undecoded,
)
from lcmlora.data.reading.tables import PRELOAD, row_name
from lcmlora.data.sources.inputs import InputFiles
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.data.unused_files import UnusedFiles
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.isolation import Piece, in_pieces, isolated, processes
from lcmlora.progress import track

_PICTURES = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_ADDRESSES = ("url", "image_url")
_KEPT = 2  # groups of rows of which pictures are in memory
_BATCH = 8  # pictures decoded from a page at once
_KEPT_BYTES = 256 << 20  # of a group's last pictures; rows are asked for in order, by several threads

NO_BYTES = "no bytes of a picture in its row"
NO_COLUMN = "table without a column of captions or of pictures"


class Parquet(EncodedPictures):
    """A parquet file, or a folder of them. A place is `file@group+row`, a key `file/row`."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._path = data.path
        self._files = InputFiles(data.path, data.links, data.split)
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], _Pictures] = OrderedDict()

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        tables = self._files.list(".parquet")
        if not tables:
            raise UserError(f"data.path: {self._path}: no .parquet files")
        found: list[Candidate] = []
        rejections: list[Rejection] = []
        positions = [Position(self._path, table) for table in track(tables, "read tables")]
        read = partial(_read, tuple(self.data.scores))
        for each in in_pieces(read, positions, lost, processes(len(tables)), preload=PRELOAD):
            if isinstance(each, Candidate):
                found.append(each)
            else:
                rejections.append(each)
        if not found and not rejections:
            raise UserError(f"data.path: {self._path}: no rows in {len(tables)} parquet files")
        if not found and all(rejection.name in tables for rejection in rejections):
            first = rejections[0]
            raise UserError(f"data.path: {self._path}: {first.name}: {first.detail or first.reason}")
        self.left_out = self._files.left_out
        return found, rejections + self._files.rejections()

    def unused_files(self) -> UnusedFiles:
        return self._files.unused_files()

    def read(self, place: str) -> bytes:
        table, _, where = place.rpartition("@")
        group, _, row = where.partition("+")
        try:
            content = self._picture(table, int(group), int(row))
        except Unavailable:
            raise
        except UserError:
            raise Unusable(UNREADABLE) from None
        if content is None:
            raise Unusable(NO_BYTES)
        if not 0 < len(content) <= MAX_BYTES:
            raise Unusable(TOO_LARGE if content else EMPTY)
        return content

    def _picture(self, table: str, group: int, row: int) -> bytes | None:
        with self._lock:
            if (table, group) not in self._groups:
                self._groups[table, group] = _Pictures(self._path, table, group)
                if len(self._groups) > _KEPT:
                    self._groups.popitem(last=False)
            return self._groups[table, group].at(row)


class _Pictures:
    """The pictures of one group of rows, decoded as they are asked for; the last of them are kept."""

    def __init__(self, path: str, table: str, group: int) -> None:
        self._path, self._table, self._group = path, table, group
        self._kept: deque[bytes | None] = deque()
        self._bytes = 0
        self._first = self._next = 0  # rows: of the first that is kept, and behind the last
        self._batches: Iterator[Any] | None = None
        self._wrong: str | None = None  # why nothing can be read from `_next` on; it would be tried for each row

    def at(self, row: int) -> bytes | None:
        if row < self._first:
            self._batches, self._wrong = None, None
        if self._batches is None:
            self._kept.clear()
            self._bytes = self._first = self._next = 0
            self._batches = self._all()
        while row >= self._next:
            if self._wrong is not None:
                raise Unusable(self._wrong)
            try:
                pictures = next(self._batches, None)
                if pictures is None:
                    raise Unusable(CORRUPT)
            except Unusable as reason:
                self._wrong = str(reason)
                raise
            self._kept.extend(pictures)
            self._next += len(pictures)
            self._bytes += sum(len(picture or b"") for picture in pictures)
            while self._bytes > _KEPT_BYTES and self._first + len(pictures) < self._next:
                self._bytes -= len(self._kept.popleft() or b"")
                self._first += 1
        return self._kept[row - self._first]

    def _all(self) -> Iterator[list[bytes | None]]:
        opened = ParquetTable(self._path, self._table)
        column = _picture_column(opened)
        for batch in opened.batches(self._group, [column], _BATCH):
            found = batch.column(column)
            yield undecoded(found if is_bytes(opened.kind(column)) else _bytes_of(found))


def _bytes_of(structs: Any) -> Any:
    """Returns the field "bytes" of a column of structs, null where the struct is."""
    import pyarrow.compute

    try:
        return pyarrow.compute.struct_field(structs, "bytes")
    except Exception as error:  # Arrow raises whatever broken bytes lead it to
        raise Unusable(CORRUPT) from error


def _read(scores: tuple[str, ...], position: Position) -> Piece[Position, Candidate | Rejection]:
    return read_piece(position, partial(_columns, scores), partial(_candidate, scores))


def _columns(scores: tuple[str, ...], opened: ParquetTable) -> list[str]:
    """Returns the columns of captions, in the order in which they count, and of scores."""
    captions = _caption_columns(opened)
    _picture_column(opened)
    for name in scores:
        if name not in opened.names:
            raise _refused(f"no column {name} (data.scores): it has {_listed(opened)}")
    return [*captions, *scores]


def _candidate(scores: tuple[str, ...], at: RowAt, fields: dict[str, Any]) -> Candidate | Rejection:
    name = row_name(at.table, at.number)
    try:
        caption = Caption("")
        for column, text in fields.items():
            if column not in scores and text is not None and not caption.text:
                if isinstance(text, Unusable):
                    raise text
                caption = decoded_caption(text)
        if not caption.text:
            raise Unusable(NO_CAPTION)
    except Unusable as reason:
        return Rejection(name, str(reason))
    return Candidate(name, caption, f"{at.table}@{at.group}+{at.row}", scores_in(fields, scores))


def _caption_columns(opened: ParquetTable) -> list[str]:
    known = [column for name in CAPTIONS for column in opened.named(name)]
    texts = [column for column in dict.fromkeys(known) if is_text(kind := opened.kind(column)) or is_bytes(kind)]
    if known and not texts:
        raise _refused(f"column {known[0]} has {opened.kind(known[0])}, expected texts")
    if not texts:
        raise _refused(f"no column of a caption: expected one of {', '.join(CAPTIONS)}, got {_listed(opened)}")
    return texts


def _picture_column(opened: ParquetTable) -> str:
    known = [column for name in _PICTURES for column in opened.named(name)]
    for column in known:
        kind = opened.kind(column)
        if is_bytes(kind) or has_bytes(kind):
            return column
    address = next((column for name in _ADDRESSES for column in opened.named(name)), None)
    if known:
        raise _refused(f"column {known[0]} has {opened.kind(known[0])}, expected bytes of pictures")
    if address is not None:
        raise _refused(
            f"has addresses ({address}) and no pictures; addresses are not fetched: img2dataset makes tables or tar "
            "files with the pictures in them"
        )
    raise _refused(f"no column of pictures: expected one of {', '.join(_PICTURES)}, got {_listed(opened)}")


def with_pictures(path: str, tables: list[str]) -> bool:
    """Whether a table has a column of pictures, or none of them can be opened, which `Parquet` then says."""
    found = isolated(partial(_has_pictures, path), tables, lambda table, reason: None, 1, preload=PRELOAD)
    told = [each for each in found if each is not None]
    return any(told) or not told


def _has_pictures(path: str, table: str) -> bool | None:
    """Whether there is such a column; None where the table cannot be opened."""
    try:
        opened = ParquetTable(path, table)
    except (Unusable, UserError):
        return None
    try:
        return bool(_picture_column(opened))
    except Unusable:
        return False


def _listed(opened: ParquetTable) -> str:
    return ", ".join(opened.names)[:300]


def _refused(detail: str) -> Unusable:
    """Returns the reason why a table is refused, with what is wrong with it as its cause."""
    refused = Unusable(NO_COLUMN)
    refused.__cause__ = Unusable(detail)
    return refused
