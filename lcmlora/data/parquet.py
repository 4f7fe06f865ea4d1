"""Source `parquet`: tables with a caption and the bytes of a picture in each row (LAION's names of columns are known).

Addresses are not fetched: tools like img2dataset do that, and write tables or tar files that can be read here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from lcmlora.data.candidates import (
    CAPTIONS,
    EMPTY,
    LONG_CAPTION,
    MAX_BYTES,
    MAX_CAPTION,
    NO_CAPTION,
    TOO_LARGE,
    UNREADABLE,
    Candidate,
    Rejection,
    Unusable,
    decoded_caption,
    printable,
    scores_in,
)
from lcmlora.data.remote import Files
from lcmlora.errors import Unavailable, UserError
from lcmlora.progress import track

_PICTURES = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_ADDRESSES = ("url", "URL", "image_url")
_KEPT = 2  # groups of rows whose pictures are in memory

NO_BYTES = "no bytes of a picture in its row"


class Parquet:
    """A parquet file, or a folder of them. A place is `file@group+row`, a key `file/row`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files = Files(path)
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def candidates(self, scores: Iterable[str] = ()) -> tuple[list[Candidate], list[Rejection]]:
        tables = self._files.list(".parquet")
        if not tables:
            raise UserError(f"data.path: {self._path}: no .parquet files")
        found: list[Candidate] = []
        rejections: list[Rejection] = []
        for table in track(tables, "read tables"):
            self._rows(table, tuple(scores), found, rejections)
        if not found and not rejections:
            raise UserError(f"data.path: {self._path}: no rows in {len(tables)} parquet files")
        return found, rejections

    def read(self, place: str) -> bytes:
        table, _, where = place.rpartition("@")
        group, _, row = where.partition("+")
        try:
            value = self._pictures(table, int(group))[int(row)].as_py()
        except Unavailable:
            raise
        except UserError:
            raise Unusable(UNREADABLE) from None
        content = value.get("bytes") if isinstance(value, dict) else value  # as Hugging Face's tables have it
        if content is None:
            raise Unusable(NO_BYTES)
        if not 0 < len(content) <= MAX_BYTES:
            raise Unusable(TOO_LARGE if content else EMPTY)
        return bytes(content)

    def _rows(self, table: str, scores: tuple[str, ...], found: list[Candidate], rejections: list[Rejection]) -> None:
        """Adds the rows of one file."""
        with self._opened(table) as opened:
            caption = self._column(table, opened, CAPTIONS, "a caption")
            self._picture_column(table, opened)
            for name in scores:
                self._column(table, opened, (name,), f"{name} (data.scores)")
            number = 0
            for group in range(opened.num_row_groups):
                read = opened.read_row_group(group, columns=[caption, *scores])
                texts = read.column(caption)
                numbers = read.select(scores).to_pylist() if scores else [{}] * len(texts)
                for row, text in enumerate(self._as_bytes(table, caption, texts)):
                    name = f"{printable(table)}/{number:06d}"
                    number += 1
                    try:
                        if text is not None and len(text) > MAX_CAPTION:
                            raise Unusable(LONG_CAPTION)
                        if not (cleaned := decoded_caption(text or b"")).text:
                            raise Unusable(NO_CAPTION)
                    except Unusable as reason:
                        rejections.append(Rejection(name, str(reason)))
                    else:
                        told = scores_in(numbers[row], scores)
                        found.append(Candidate(name, cleaned, f"{table}@{group}+{row}", told))

    def _pictures(self, table: str, group: int) -> Any:
        """Returns the column of pictures of a group of rows. Rows are asked for in order, so few groups are kept."""
        with self._lock:
            if (table, group) not in self._groups:
                with self._opened(table) as opened:
                    column = self._picture_column(table, opened)
                    self._groups[table, group] = opened.read_row_group(group, columns=[column]).column(0)
                if len(self._groups) > _KEPT:
                    self._groups.popitem(last=False)
            return self._groups[table, group]

    def _opened(self, table: str) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self._files.open(table))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"data.path: {self._path}: {table}: not a parquet file: {error}") from None

    def _picture_column(self, table: str, opened: Any) -> str:
        import pyarrow.types

        names = opened.schema_arrow.names
        if not any(name in names for name in _PICTURES) and (address := next(iter({*names} & {*_ADDRESSES}), None)):
            raise UserError(
                f"data.path: {self._path}: {table}: has addresses ({address}) and no pictures; addresses are not "
                "fetched: img2dataset makes tables or tar files with the pictures in them"
            )
        column = self._column(table, opened, _PICTURES, "pictures")
        kind = opened.schema_arrow.field(column).type
        if pyarrow.types.is_struct(kind) and "bytes" in {field.name for field in kind}:
            kind = kind.field("bytes").type
        if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
            raise UserError(f"data.path: {self._path}: {table}: column {column} has {kind}, expected bytes of pictures")
        return column

    def _column(self, table: str, opened: Any, known: tuple[str, ...], what: str) -> str:
        names = opened.schema_arrow.names
        for name in known:
            if name in names:
                return name
        raise UserError(
            f"data.path: {self._path}: {table}: no column of {what}: expected one of {', '.join(known)}, got "
            f"{', '.join(names)}"
        )

    def _as_bytes(self, table: str, column: str, texts: Any) -> list[bytes | None]:
        """Returns the texts undecoded: one that is not UTF-8 must not stop the others."""
        import pyarrow

        try:
            found: list[bytes | None] = texts.cast(pyarrow.large_binary()).to_pylist()
        except pyarrow.ArrowException:
            raise UserError(
                f"data.path: {self._path}: {table}: column {column} has {texts.type}, expected texts"
            ) from None
        return found
