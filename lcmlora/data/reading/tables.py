"""Rows of tables that people write: .jsonl, .csv, .txt and .parquet, here or in a bucket, read in isolated processes.

    for row in read_rows(path, ["metadata.jsonl", "more/metadata.parquet"]):
        if isinstance(row, Rejection): ...    # one damaged row, or a table whose rest cannot be read
        row.name, row.number, row.fields      # "metadata.jsonl/000017", 17, {"file_name": ..., "text": ...}

A damaged row is a `Rejection` with its own number; the other rows are read. No content of a table raises an error.
"""

from __future__ import annotations

import csv
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import IO, NamedTuple

from lcmlora.data.reading import parquet_files
from lcmlora.data.reading.candidates import NOT_UTF8, UNREADABLE, Rejection, Unusable, printable
from lcmlora.data.reading.parquet_files import GIVEN_UP, MAX_REFUSED, TWO_COLUMNS, ParquetRow
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.isolation import Piece, in_pieces, processes
from lcmlora.io.parsing import JsonObject, Malformed, parse_json
from lcmlora.io.remote import Files
from lcmlora.io.terminal import joined

KINDS = (".jsonl", ".csv", ".txt", ".parquet")
PRELOAD = (  # for all readers of data: the processes are started once, with the modules that the first reader names
    "lcmlora.data.decoding",
    "lcmlora.data.duplicates",
    "lcmlora.data.sources.folder",
    "lcmlora.data.sources.parquet",
    "lcmlora.data.sources.tars",
)

MAX_ROW = 1 << 20  # bytes of a line, or of a row of several lines
PIECE_BYTES = 8 << 20
PIECE_ROWS = 20_000
PIECE_SECONDS = 10.0  # a bucket may be slow, and a piece has 60 seconds

NOT_JSON = "its line is not a JSON object"
ARRAY = "one JSON document over several lines; expected an object in each line"
LONG_ROW = f"row of more than {MAX_ROW} bytes"
MORE_FIELDS = "row with more fields than the header; put texts that have commas into double quotes"
FEWER_FIELDS = "row with fewer fields than the header"
BAD_QUOTES = "row whose quotes do not close; double those within a text"
SEPARATOR = "columns are not separated by commas"
NO_HEADER = "no header that can be read"
UTF16 = "UTF-16; expected UTF-8"
COMPRESSED = "compressed; expected plain text"


class Row(NamedTuple):
    """One row of a table.

    number: the line of .jsonl and .txt, from 1; the row below the header of .csv, from 1; the row of .parquet, from 0.
    fields: by the names of keys or columns. The line of a .txt, or a line of .jsonl that is a text instead of an
        object, is the field "".
    """

    table: str
    number: int
    fields: JsonObject

    @property
    def name(self) -> str:
        return row_name(self.table, self.number)


def row_name(table: str, number: int) -> str:
    """Returns the name by which people find a row."""
    return f"{printable(table)}/{number:06d}"


def read_rows(
    path: str, tables: Collection[str], *, wanted: Collection[str] | None = None
) -> Iterator[Row | Rejection]:
    """Yields every row of the tables, in order.

    Args:
        path: a file or a folder, here or in a bucket, as `remote.Files` takes it.
        tables: names of files below it; their endings say how they are read (KINDS).
        wanted: names of the fields to read, in any case of letters; by default all except columns of bytes.

    Raises:
        Unavailable: a bucket does not answer.
    """
    if not tables:
        return
    names = None if wanted is None else frozenset(name.casefold() for name in wanted)
    positions = [
        parquet_files.Position(path, table) if table.lower().endswith(".parquet") else _TextPosition(path, table, names)
        for table in tables
    ]
    read = partial(_read_piece, names)
    yield from in_pieces(read, positions, _after_loss, processes(len(positions)), preload=PRELOAD)


class _TextPosition(NamedTuple):
    """Where the next piece of a table begins that is text.

    offset: bytes before it.
    number: lines or rows before it.
    header: names of the columns, if they were read.
    inside: whether it is inside a line that is too long and was rejected.
    refused: rows before it that were rejected.
    """

    path: str
    table: str
    wanted: frozenset[str] | None
    offset: int = 0
    number: int = 0
    header: tuple[str, ...] | None = None
    inside: bool = False
    refused: int = 0


_Position = _TextPosition | parquet_files.Position


def _read_piece(wanted: frozenset[str] | None, position: _Position) -> Piece[_Position, Row | Rejection]:
    if isinstance(position, parquet_files.Position):
        piece = parquet_files.read_piece(position, partial(_readable_columns, wanted), _parquet_row)
        return Piece(piece.results, piece.rest)
    try:
        with Files(position.path).open(position.table) as file:
            return _read_text(position, file)
    except Unavailable:
        raise
    except (UserError, OSError) as error:
        return Piece([Rejection(printable(position.table), UNREADABLE, detail=joined(error))], None)


def _read_text(position: _TextPosition, file: IO[bytes]) -> Piece[_Position, Row | Rejection]:
    """Reads lines until there are enough for one piece; returns their rows and where the next piece begins."""
    if not position.offset and (reason := _not_text(position.table, file.read(4096))):
        return Piece([Rejection(printable(position.table), reason)], None)
    lines = _Lines(file, position.offset, position.inside)
    results: list[Row | Rejection] = []
    number, header, refused = position.number, position.header, position.refused
    until = time.monotonic() + PIECE_SECONDS
    while len(results) < PIECE_ROWS and lines.offset < position.offset + PIECE_BYTES and time.monotonic() < until:
        if lines.inside:
            lines.skip()
            continue
        if (line := lines.take()) is None:
            return Piece(results, None)
        number += 1
        if not line.strip():
            number -= position.table.lower().endswith(".csv")
            continue
        if position.table.lower().endswith(".csv") and header is None:
            number = 0
            header, reason = _header(line, lines)
            if reason:
                return Piece([Rejection(printable(position.table), reason, detail=_excerpt(line))], None)
            continue
        try:
            fields = _fields(position.table, line, lines, header)
        except Unusable as reason:
            refused += 1
            detail = f"row {number}: {_excerpt(line)}"
            results.append(Rejection(row_name(position.table, number), str(reason), detail=detail))
            if refused > MAX_REFUSED and 2 * refused > number:
                results.append(Rejection(row_name(position.table, number + 1), GIVEN_UP))
                return Piece(results, None)
            continue
        if position.wanted is not None:
            fields = {name: value for name, value in fields.items() if name.casefold() in position.wanted}
        results.append(Row(position.table, number, fields))
    return Piece(
        results,
        position._replace(offset=lines.offset, number=number, header=header, inside=lines.inside, refused=refused),
    )


def _not_text(table: str, start: bytes) -> str:
    """Returns why a file with this beginning is not read as text; empty if it is."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return UTF16
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh")):
        return COMPRESSED
    if table.lower().endswith(".jsonl"):
        first = start.removeprefix(b"\xef\xbb\xbf").strip().splitlines()[:1]
        if first and (first[0].startswith(b"[") or first[0].strip() == b"{"):
            return ARRAY
    return ""


def _header(line: bytes, lines: _Lines) -> tuple[tuple[str, ...], str]:
    """Returns the names of a .csv's columns, and why they cannot be used; that is empty if they can."""
    try:
        if len(line) > MAX_ROW:
            raise Unusable(LONG_ROW)
        names = tuple(name.strip() for name in _split_row(line.removeprefix(b"\xef\xbb\xbf"), lines))
    except Unusable as reason:
        return (), f"{NO_HEADER}: {reason}"
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return (), SEPARATOR
    not_empty = [name for name in names if name]
    return names, TWO_COLUMNS if len({*not_empty}) < len(not_empty) else ""


def _fields(table: str, line: bytes, lines: _Lines, header: tuple[str, ...] | None) -> JsonObject:
    """Returns the fields of the row that begins with this line. Raises Unusable."""
    if len(line) > MAX_ROW:
        raise Unusable(LONG_ROW)
    if header is not None:
        return _csv_fields(line, lines, header)
    text = _decoded(line)
    if table.lower().endswith(".txt"):
        return {"": text}
    try:
        value = parse_json(text, nan_is_null=True)
    except Malformed as error:
        raise Unusable(NOT_UTF8 if "surrogate" in str(error) else NOT_JSON) from None
    if isinstance(value, str):
        return {"": value}
    if not isinstance(value, dict):
        raise Unusable(NOT_JSON)
    return value


def _csv_fields(line: bytes, lines: _Lines, header: tuple[str, ...]) -> dict[str, str]:
    if len(header) == 1 and not line.lstrip().startswith(b'"'):  # the only column is the line, with its commas
        return {header[0]: _decoded(line)}
    values = _split_row(line, lines)
    if len(values) != len(header):
        raise Unusable(MORE_FIELDS if len(values) > len(header) else FEWER_FIELDS)
    return dict(zip(header, values, strict=True))


def _split_row(line: bytes, lines: _Lines) -> list[str]:
    """Returns the fields of a row of .csv; takes further lines while quotes are open.

    Raises:
        Unusable: the row is damaged; then it is this line only, and the lines after it are rows of their own.
    """
    if b'"' not in line:
        return [field.lstrip(" ") for field in _decoded(line).split(",")]
    taken: list[bytes] = []

    def following() -> Iterator[str]:
        yield line.decode("utf-8", "surrogateescape")
        size = len(line)
        while size <= MAX_ROW and (further := lines.take()) is not None:
            taken.append(further)
            size += len(further)
            yield further.decode("utf-8", "surrogateescape")

    try:
        values = next(csv.reader(following(), strict=True, skipinitialspace=True))
    except csv.Error:
        lines.give_back(taken)
        raise Unusable(BAD_QUOTES) from None
    _decoded(line + b"".join(taken))
    return values


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise Unusable(NOT_UTF8) from None


def _excerpt(line: bytes) -> str:
    """Returns the beginning of a line, for people."""
    return printable(" ".join(line[:200].decode("utf-8", "backslashreplace").split()))


def _readable_columns(wanted: frozenset[str] | None, table: parquet_files.ParquetTable) -> list[str]:
    """Returns the wanted columns that do not hold bytes."""
    types = {name: table.type_of(name) for name in table.names if wanted is None or name.casefold() in wanted}
    return [
        name for name, type in types.items() if not parquet_files.is_bytes(type) and not parquet_files.has_bytes(type)
    ]


def _parquet_row(at: parquet_files.RowAt, values: ParquetRow) -> Row | Rejection:
    try:
        fields = {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
    except UnicodeDecodeError:
        return Rejection(row_name(at.table, at.number), NOT_UTF8)
    if reason := next((value for value in fields.values() if isinstance(value, Unusable)), None):
        return Rejection(row_name(at.table, at.number), str(reason))
    return Row(at.table, at.number, fields)


def _after_loss(position: _Position, reason: str) -> Piece[_Position, Row | Rejection]:
    """Returns the piece that stands in for one whose process crashed or hung."""
    if isinstance(position, parquet_files.Position):
        piece = parquet_files.after_loss(position, reason)
        return Piece(piece.results, piece.rest)
    return Piece([Rejection(row_name(position.table, position.number + 1), f"from this row on, {reason}")], None)


class _Lines:
    """The lines of a file from an offset on, ended by LF, CR or CRLF; of a line that is too long only the beginning."""

    _BLOCK = 1 << 20

    def __init__(self, file: IO[bytes], offset: int, inside: bool) -> None:
        file.seek(offset)
        self._file = file
        self._read: deque[bytes] = deque()  # lines that were read and not taken yet
        self._carry = b""  # the beginning of a line whose end was not read yet
        self._ended = False
        self._cut = False  # whether the last line that was read continues in the file
        self.offset = offset  # after the last line that was taken
        self.inside = inside  # whether the last line that was taken continues: `skip` until it does not

    def take(self) -> bytes | None:
        """Returns the next line with its end, or the first MAX_ROW bytes and some more; None at the end of the file."""
        while not self._read and not self._ended:
            self._fill()
        if not self._read:
            return None
        line = self._read.popleft()
        self.inside = self._cut and not self._read
        self.offset += len(line)
        return line

    def give_back(self, lines: Sequence[bytes]) -> None:
        """Undoes the last `take` calls, which returned these lines."""
        self._read.extendleft(reversed(lines))
        self.offset -= sum(map(len, lines))
        self.inside = False

    def skip(self) -> None:
        """Skips a block of the line that continues."""
        self._cut = False
        block = self._file.read(self._BLOCK)
        ends = [end for end in (block.find(b"\n"), block.find(b"\r")) if end >= 0]
        self.inside = bool(block) and not ends
        length = min(ends) + 1 if ends else len(block)
        length += block[length - 1 : length + 1] == b"\r\n"
        self._carry = block[length:]
        if ends and block.endswith(b"\r") and length == len(block):  # perhaps half of \r\n
            following = self._file.read(1)
            length += following == b"\n"
            self._carry = following.replace(b"\n", b"")
        self.offset += length

    def _fill(self) -> None:
        block = self._file.read(self._BLOCK)
        self._ended = not block
        lines = (self._carry + block).splitlines(keepends=True)
        self._carry = b""
        if lines and block and not lines[-1].endswith(b"\n"):
            self._carry = lines.pop()
        self._read.extend(lines)
        if len(self._carry) > MAX_ROW and not self._read:
            self._read.append(self._carry)
            self._carry = b""
            self._cut = True
