"""Reads Parquet files within limits; a damaged or hostile one raises `Unusable` with a reason.

The numbers of rows and bytes in the footer are checked first: a file of a kilobyte may claim millions of rows, and a
page of a kilobyte may expand to gigabytes. Files of others are read only in processes that may crash
(lcmlora/io/isolation.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from lcmlora.data.reading.candidates import UNREADABLE, Rejection, Unusable, printable
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.isolation import Piece
from lcmlora.io.remote import Files
from lcmlora.io.terminal import joined

R = TypeVar("R")

NOT_PARQUET = "not a parquet file, or one that was cut off"
CORRUPT = "damaged group of rows or page"
EXPANDS = "expands to far more than its bytes (decompression bomb)"
TWO_COLUMNS = "two columns of one name"

GIVEN_UP = "most rows before it are damaged; the table is not read from here on"
MAX_REFUSED = 100_000  # rows that are rejected one by one, if they are most rows of the table
PIECE_ROWS = 50_000
PIECE_BYTES = 16 << 20  # of texts
PIECE_SECONDS = 10.0  # a bucket may be slow, and a piece has 60 seconds
MAX_LOST = 8  # groups of rows of a table that may crash or hang the process before the rest is given up

_BATCH = 1024  # rows
_ROWS = 1 << 16  # rows that a file of any size may have in a group
_ROWS_PER_BYTE = 16  # further rows for each byte of the file
_BYTES = 64 << 20  # bytes to which a file of any size may expand
_EXPANSION = 256  # further bytes for each byte of the file
_BUFFER = 4 << 20  # bytes read at once; by default a whole column of a group is

# A row's values by column, as Python objects of any type; texts are bytes, and a value that cannot be read is Unusable.
ParquetRow = dict[str, Any]


class ParquetTable:
    """One Parquet file that is open.

    Attributes:
        size: bytes of the file.
        names: of the columns.
        groups: how many groups of rows it has.
        limit: bytes to which its texts may expand.
    """

    def __init__(self, path: str, table: str) -> None:
        """Raises Unusable; UserError if the file cannot be opened."""
        import pyarrow.parquet

        file = Files(path).open(table)
        try:
            self.size = file.seek(0, 2)
            self._file = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER)
            self.names: list[str] = self._file.schema_arrow.names
            self._metadata = self._file.metadata
            self.groups: int = self._metadata.num_row_groups
        except (UserError, MemoryError):
            raise
        except Exception as error:  # Arrow raises whatever broken bytes lead it to
            raise Unusable(NOT_PARQUET) from error
        self.limit = _BYTES + _EXPANSION * self.size

    def columns_named(self, name: str) -> list[str]:
        """Returns the column with exactly this name; if there is none, those whose names differ only in case."""
        return [name] if name in self.names else [n for n in self.names if n.casefold() == name.casefold()]

    def type_of(self, name: str) -> Any:
        """Returns the Arrow type of a column; for a dictionary, the type of its values. Raises Unusable."""
        import pyarrow.types

        if self.names.count(name) > 1:
            raise Unusable(TWO_COLUMNS)
        column_type = self._file.schema_arrow.field(name).type
        return column_type.value_type if pyarrow.types.is_dictionary(column_type) else column_type

    def rows(self, group: int) -> int:
        """Returns how many rows a group has. Raises Unusable if they are more than the file's bytes can hold."""
        try:
            rows = int(self._metadata.row_group(group).num_rows)
        except Exception as error:
            raise Unusable(CORRUPT) from error
        if not 0 <= rows <= _ROWS + _ROWS_PER_BYTE * self.size:
            raise Unusable(EXPANDS if rows > 0 else CORRUPT)
        return rows

    def batches(self, group: int, columns: Collection[str], size: int) -> Iterator[Any]:
        """Yields the rows of a group in record batches of `size` rows. Raises Unusable after the last readable one."""
        if not columns:
            return
        self._check_size(group)
        try:
            yield from self._file.iter_batches(size, row_groups=[group], columns=[*columns], use_threads=False)
        except (UserError, GeneratorExit):
            raise
        except MemoryError:
            raise Unusable(EXPANDS) from None
        except Exception as error:
            raise Unusable(CORRUPT) from error

    def _check_size(self, group: int) -> None:
        """Raises Unusable if a group claims to expand to more than the file's bytes can.

        The sizes of its columns are not read, because Arrow ends the process if their statistics are damaged.
        """
        self.rows(group)
        try:
            size = int(self._metadata.row_group(group).total_byte_size)
        except Exception as error:
            raise Unusable(CORRUPT) from error
        if not 0 <= size <= self.limit:
            raise Unusable(EXPANDS if size > 0 else CORRUPT)


def is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def has_bytes(kind: Any) -> bool:
    """Returns whether values of this type have a field "bytes", as the pictures in Hugging Face's tables do."""
    import pyarrow.types

    return pyarrow.types.is_struct(kind) and any(field.name == "bytes" and is_bytes(field.type) for field in kind)


def as_bytes(column: Any) -> list[bytes | None]:
    """Returns the values of a column of texts or bytes as bytes, so that a text that is not UTF-8 stops no other."""
    import pyarrow

    try:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    except MemoryError:
        raise Unusable(EXPANDS) from None
    except Exception as error:
        raise Unusable(CORRUPT) from error
    return values


def as_python(column: Any) -> list[Any]:
    """Returns the values of a column as in a ParquetRow."""
    import pyarrow

    value_type = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if is_text(value_type) or is_bytes(value_type):
        return as_bytes(column)
    return [_value(each) for each in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception:  # a date after the year 9999, a list of texts that are not UTF-8
        return Unusable(CORRUPT)


class Position(NamedTuple):
    """Where the next piece of a table begins, for `read_piece`.

    row: the number of the next row in its group.
    number: the number of the next row in the table.
    expanded: bytes of the texts before it.
    refused, lost: rows before it that were rejected, and groups that crashed or hung the process.
    alone: whether the piece ends with the group.
    skip: why the rest of the group is rejected; empty if it is read.
    """

    path: str
    table: str
    group: int = 0
    row: int = 0
    number: int = 0
    expanded: int = 0
    refused: int = 0
    lost: int = 0
    alone: bool = False
    skip: str = ""


class RowAt(NamedTuple):
    """Where a row is: the group, the row's number in the group, and its number in the table, all from 0."""

    table: str
    group: int
    row: int
    number: int


def after_loss(position: Position, reason: str) -> Piece[Position, Any]:
    """Returns the piece that stands in for one whose process crashed or hung.

    First the groups are read one by one; then the group that fails is skipped; after MAX_LOST groups the table ends.
    """
    if position.skip or position.lost >= MAX_LOST:
        return Piece(
            [Rejection(f"{printable(position.table)}/{position.number:06d}", f"from this row on, {reason}")], None
        )
    if not position.alone:
        return Piece([], position._replace(alone=True))
    return Piece([], position._replace(skip=f"its group of rows {reason}", lost=position.lost + 1))


def read_piece(
    position: Position,
    choose: Callable[[ParquetTable], Sequence[str]],
    make: Callable[[RowAt, ParquetRow], R | Rejection],
) -> Piece[Position, R | Rejection]:
    """Returns the results of `make` for the next rows.

    Args:
        choose: returns the columns to read. Raises Unusable with the reason why the table is refused.
        make: returns a row's result.
    """
    try:
        table = _open_table(position.path, position.table)
        columns = choose(table)
    except Unavailable:
        raise
    except Unusable as reason:
        detail = joined(reason.__cause__ or "")
        return Piece([Rejection(printable(position.table), str(reason), detail=detail)], None)
    except UserError as error:
        return Piece([Rejection(printable(position.table), UNREADABLE, detail=str(error))], None)
    results: list[R | Rejection] = []
    until = time.monotonic() + PIECE_SECONDS
    start = position
    while position.group < table.groups:
        position, done = _read_group(table, position, columns, make, results, until, start)
        if table.limit < position.expanded or MAX_REFUSED < position.refused > position.number / 2:
            if not done or position.group + 1 < table.groups:
                results.append(Rejection(_row_name(position), EXPANDS if table.limit < position.expanded else GIVEN_UP))
            return Piece(results, None)
        if not done:
            return Piece(results, position)
        position = position._replace(group=position.group + 1, row=0, alone=False, skip="")
        if start.alone or _is_piece_full(results, position, start, until):
            return Piece(results, position)
    return Piece(results, None)


def _read_group(
    table: ParquetTable,
    position: Position,
    columns: Sequence[str],
    make: Callable[[RowAt, ParquetRow], R | Rejection],
    results: list[R | Rejection],
    until: float,
    start: Position,
) -> tuple[Position, bool]:
    """Adds results of one group's rows. Returns the position after the last of them, and whether the group is done."""
    rows = None
    try:
        rows = table.rows(position.group)
        if position.skip:
            raise Unusable(position.skip)
        batches = _batches_from(table, position, columns)
        for batch in batches:
            values = {name: as_python(batch.column(name)) for name in columns}
            expanded = position.expanded + sum(len(v) for c in values.values() for v in c if isinstance(v, bytes))
            if expanded > table.limit:
                position = position._replace(expanded=expanded)
                raise Unusable(EXPANDS)
            refused = 0
            for i in range(batch.num_rows):
                row = {name: column[i] for name, column in values.items()}
                result = make(RowAt(position.table, position.group, position.row + i, position.number + i), row)
                results.append(result)
                refused += isinstance(result, Rejection)
            position = position._replace(
                row=position.row + batch.num_rows,
                number=position.number + batch.num_rows,
                expanded=expanded,
                refused=position.refused + refused,
            )
            if position.row < rows and _is_piece_full(results, position, start, until):
                _unfinished.append((position[:4], batches))
                return position, False
        if position.row != rows:
            raise Unusable(CORRUPT)
    except Unusable as reason:
        return _reject_rows(position, max(1, (rows or 0) - position.row), reason, results), True
    return position, True


# At most one iterator over the batches of a group, and the position (path, table, group, row) of its next batch: the
# next piece continues with it.
_unfinished: list[tuple[tuple[str, str, int, int], Iterator[Any]]] = []


def _batches_from(table: ParquetTable, position: Position, columns: Sequence[str]) -> Iterator[Any]:
    """Returns the batches of a group from this row on; decodes those before it only if no iterator was kept for it."""
    kept = _unfinished.pop() if _unfinished else None
    _unfinished.clear()
    if kept is not None and kept[0] == position[:4]:
        return kept[1]
    batches = table.batches(position.group, columns, _BATCH)
    skipped = 0
    while skipped < position.row:
        batch = next(batches, None)
        if batch is None:
            raise Unusable(CORRUPT)
        skipped += batch.num_rows
    return batches


def _is_piece_full(results: list[Any], position: Position, start: Position, until: float) -> bool:
    return len(results) >= PIECE_ROWS or position.expanded - start.expanded >= PIECE_BYTES or time.monotonic() > until


def _reject_rows(position: Position, count: int, reason: Unusable, results: list[Any]) -> Position:
    """Rejects the next rows, which are the rest of a group: one by one, or all at once if they are very many."""
    detail = joined(reason.__cause__ or "")
    if count > PIECE_ROWS:
        results.append(Rejection(_row_name(position), str(reason), detail=f"and the {count - 1} rows after it"))
    else:
        numbers = range(position.number, position.number + count)
        names = [_row_name(position._replace(number=number)) for number in numbers]
        results += [Rejection(name, str(reason), detail=detail) for name in names]
    return position._replace(number=position.number + count, refused=position.refused + min(count, PIECE_ROWS))


def _row_name(position: Position) -> str:
    return f"{printable(position.table)}/{position.number:06d}"


@lru_cache(1)
def _open_table(path: str, table: str) -> ParquetTable:
    return ParquetTable(path, table)
