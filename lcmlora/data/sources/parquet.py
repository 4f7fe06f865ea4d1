"""Source `parquet`: tables with a caption and the bytes of a picture in each row (columns may have LAION's names).

Addresses are not downloaded: tools like img2dataset do that, and write tables or tar files that can be read here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from lcmlora.config import Data
from lcmlora.data.preparation.shards import InputShard
from lcmlora.data.preparation.surveying import Listed
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
    ParquetRow,
    ParquetTable,
    Position,
    RowAt,
    after_loss,
    as_bytes,
    has_bytes,
    is_bytes,
    is_text,
    read_piece,
)
from lcmlora.data.reading.tables import PRELOAD, row_name
from lcmlora.data.sources.inputs import InputFiles
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.data.unused_files import UnusedFiles, tally
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.isolation import Piece, Processes, isolated

_PICTURES = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_ADDRESSES = ("url", "image_url")
_MAX_GROUPS = 2  # groups of rows whose pictures are in memory
_BATCH = 8  # pictures decoded from a page at once
_REFUSED = 3  # rank of rejections
_KEPT_BYTES = 256 << 20  # of a group's last pictures; several threads ask for rows, roughly in order

NO_BYTES = "no bytes of a picture in its row"
NO_COLUMN = "table without a column of captions or of pictures"


class Parquet(EncodedPictures):
    """A Parquet file, or a folder of them. A place is `file@group+row`, a key `file/row`. A shard is a file."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._path = data.path
        self._files = InputFiles(data.path, data.links, data.split)
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], _Pictures] = OrderedDict()

    def shards(self) -> Iterator[InputShard]:
        tables = self._files.list(".parquet")
        if not tables:
            raise UserError(f"data.path: {self._path}: no .parquet files")
        self.left_out = {split: tally(names) for split, names in self._files.left_out.items()}
        yield from self._files.shards(tables)

    def listed(self, shard: InputShard, processes: Processes) -> Iterator[Candidate | Rejection]:
        read = partial(_read_piece, tuple(self.data.scores))
        yield from processes.pieces(read, Position(self._path, shard.content), after_loss)

    def refused(self) -> Iterable[Rejection]:
        return [replace(rejection, rank=_REFUSED) for rejection in self._files.rejections()]

    def unit_of(self, candidate: Candidate) -> str:
        return candidate.place.rpartition("+")[0]  # pages of a group are decoded from its beginning

    def check_listed(self, listed: Listed) -> None:
        if not (listed.candidates or listed.rejections):
            raise UserError(f"data.path: {self._path}: no rows in {listed.shards} parquet files")
        if listed.first and not listed.candidates and listed.of_shards == listed.rejections:
            raise UserError(
                f"data.path: {self._path}: {listed.first.name}: {listed.first.detail or listed.first.reason}"
            )

    def unused_files(self) -> UnusedFiles:
        return self._files.unused_files()

    def read(self, place: str) -> bytes:
        table, _, group_and_row = place.rpartition("@")
        group, _, row = group_and_row.partition("+")
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
                if len(self._groups) > _MAX_GROUPS:
                    self._groups.popitem(last=False)
            return self._groups[table, group].read(row)


class _Pictures:
    """The pictures of one group of rows, decoded when they are asked for; the last ones are kept in memory."""

    def __init__(self, path: str, table: str, group: int) -> None:
        self._path, self._table, self._group = path, table, group
        self._kept: deque[bytes | None] = deque()
        self._bytes = 0
        self._first = self._next = 0  # the first row that is kept, and the row after the last
        self._batches: Iterator[Any] | None = None
        self._failure: str | None = None  # why no row can be read from `_next` on, so that it is not tried for each row

    def read(self, row: int) -> bytes | None:
        """Returns the picture of a row; None if the row has none. Raises Unusable."""
        if row < self._first:
            self._batches, self._failure = None, None
        if self._batches is None:
            self._kept.clear()
            self._bytes = self._first = self._next = 0
            self._batches = self._decode()
        while row >= self._next:
            if self._failure is not None:
                raise Unusable(self._failure)
            try:
                pictures = next(self._batches, None)
                if pictures is None:
                    raise Unusable(CORRUPT)
            except Unusable as reason:
                self._failure = str(reason)
                raise
            self._kept.extend(pictures)
            self._next += len(pictures)
            self._bytes += sum(len(picture or b"") for picture in pictures)
            while self._bytes > _KEPT_BYTES and self._first + len(pictures) < self._next:
                self._bytes -= len(self._kept.popleft() or b"")
                self._first += 1
        return self._kept[row - self._first]

    def _decode(self) -> Iterator[list[bytes | None]]:
        """Yields the pictures of the group, a few rows at a time."""
        table = ParquetTable(self._path, self._table)
        name = _picture_column(table)
        for batch in table.batches(self._group, [name], _BATCH):
            column = batch.column(name)
            yield as_bytes(column if is_bytes(table.type_of(name)) else _bytes_of(column))


def _bytes_of(structs: Any) -> Any:
    """Returns the field "bytes" of a column of structs; it is null in rows whose struct is null."""
    import pyarrow.compute

    try:
        return pyarrow.compute.struct_field(structs, "bytes")
    except Exception as error:  # Arrow raises whatever broken bytes lead it to
        raise Unusable(CORRUPT) from error


def _read_piece(scores: tuple[str, ...], position: Position) -> Piece[Position, Candidate | Rejection]:
    return read_piece(position, partial(_columns, scores), partial(_candidate, scores))


def _columns(scores: tuple[str, ...], table: ParquetTable) -> list[str]:
    """Returns the columns of captions, in the order in which they count, and of scores."""
    captions = _caption_columns(table)
    _picture_column(table)
    for name in scores:
        if name not in table.names:
            raise _no_column(f"no column {name} (data.scores): it has {_column_names(table)}")
    return [*captions, *scores]


def _candidate(scores: tuple[str, ...], at: RowAt, fields: ParquetRow) -> Candidate | Rejection:
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


def _caption_columns(table: ParquetTable) -> list[str]:
    known = [column for name in CAPTIONS for column in table.columns_named(name)]
    texts = [column for column in dict.fromkeys(known) if is_text(kind := table.type_of(column)) or is_bytes(kind)]
    if known and not texts:
        raise _no_column(f"column {known[0]} has {table.type_of(known[0])}, expected texts")
    if not texts:
        raise _no_column(f"no column of a caption: expected one of {', '.join(CAPTIONS)}, got {_column_names(table)}")
    return texts


def _picture_column(table: ParquetTable) -> str:
    known = [column for name in _PICTURES for column in table.columns_named(name)]
    for column in known:
        kind = table.type_of(column)
        if is_bytes(kind) or has_bytes(kind):
            return column
    address = next((column for name in _ADDRESSES for column in table.columns_named(name)), None)
    if known:
        raise _no_column(f"column {known[0]} has {table.type_of(known[0])}, expected bytes of pictures")
    if address is not None:
        raise _no_column(
            f"has addresses ({address}) and no pictures; addresses are not fetched: img2dataset makes tables or tar "
            "files with the pictures in them"
        )
    raise _no_column(f"no column of pictures: expected one of {', '.join(_PICTURES)}, got {_column_names(table)}")


def any_has_pictures(path: str, tables: list[str]) -> bool:
    """Returns whether a table has a column of pictures. Also true if no table can be opened: `Parquet` says so."""
    answers = isolated(partial(_has_pictures, path), tables, lambda table, reason: None, 1, preload=PRELOAD)
    opened = [answer for answer in answers if answer is not None]
    return any(opened) or not opened


def _has_pictures(path: str, table: str) -> bool | None:
    """Returns whether the table has a column of pictures; None if it cannot be opened."""
    try:
        opened = ParquetTable(path, table)
    except (Unusable, UserError):
        return None
    try:
        return bool(_picture_column(opened))
    except Unusable:
        return False


def _column_names(table: ParquetTable) -> str:
    return ", ".join(table.names)[:300]


def _no_column(detail: str) -> Unusable:
    """Returns the reason why a table is refused; its cause says what is wrong with the table's columns."""
    reason = Unusable(NO_COLUMN)
    reason.__cause__ = Unusable(detail)
    return reason
