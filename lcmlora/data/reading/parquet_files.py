"""Parquet files, read within limits: whatever a damaged or hostile one does is an `Unusable` with a reason.

Its footer says how many rows and bytes there are, and neither is believed: a file of a kilobyte may say millions of
rows, and a page of a kilobyte expand to gigabytes. Read from outside only in processes that may end (isolation.py).
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
MAX_REFUSED = 100_000  # rows of a table that are rejected one by one, where they are most of its rows
PIECE_ROWS = 50_000
PIECE_BYTES = 16 << 20  # of texts
PIECE_SECONDS = 10.0  # a bucket may be slow, and a piece has 60 seconds
MAX_LOST = 8  # groups of rows of a table that may hang or crash before no further one is tried

_BATCH = 1024  # rows
_ROWS = 1 << 16  # that any file may have; more need bytes
_ROWS_OF_BYTE = 16
_BYTES = 64 << 20  # to which any file, or a column of a group of rows, may expand; more need bytes in the file
_RATIO = 256
_BUFFER = 4 << 20  # bytes read at once; without it a whole column of a group is


class ParquetTable:
    """One parquet file, opened. `names` are those of its columns."""

    def __init__(self, path: str, table: str) -> None:
        """Raises Unusable; UserError where it cannot be opened as a file."""
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
        self.limit = _BYTES + _RATIO * self.size  # bytes to which all its texts may expand

    def named(self, name: str) -> list[str]:
        """Returns the columns of this name: the one itself, else those that differ in case."""
        return [name] if name in self.names else [n for n in self.names if n.casefold() == name.casefold()]

    def kind(self, name: str) -> Any:
        """Returns the type of a column; of a dictionary that of its values. Raises Unusable."""
        import pyarrow.types

        if self.names.count(name) > 1:
            raise Unusable(TWO_COLUMNS)
        kind = self._file.schema_arrow.field(name).type
        return kind.value_type if pyarrow.types.is_dictionary(kind) else kind

    def rows(self, group: int) -> int:
        """Returns how many rows a group has. Raises Unusable where they are more than its bytes can be."""
        try:
            rows = int(self._metadata.row_group(group).num_rows)
        except Exception as error:
            raise Unusable(CORRUPT) from error
        if not 0 <= rows <= _ROWS + _ROWS_OF_BYTE * self.size:
            raise Unusable(EXPANDS if rows > 0 else CORRUPT)
        return rows

    def batches(self, group: int, columns: Collection[str], size: int) -> Iterator[Any]:
        """Yields the rows of a group in record batches of `size`. Raises Unusable, after what could be read."""
        if not columns:
            return
        self._check(group)
        try:
            yield from self._file.iter_batches(size, row_groups=[group], columns=[*columns], use_threads=False)
        except (UserError, GeneratorExit):
            raise
        except MemoryError:
            raise Unusable(EXPANDS) from None
        except Exception as error:
            raise Unusable(CORRUPT) from error

    def _check(self, group: int) -> None:
        """Raises Unusable where a group says that it expands to more than the bytes of its file can be.

        The sizes of its columns are not looked at: Arrow ends the process where their statistics are damaged.
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
    """Returns whether these are structs with a field "bytes", as Hugging Face's tables have pictures."""
    import pyarrow.types

    return pyarrow.types.is_struct(kind) and any(field.name == "bytes" and is_bytes(field.type) for field in kind)


def undecoded(column: Any) -> list[bytes | None]:
    """Returns the values of a column of texts or bytes. Text that is not UTF-8 must not stop the others."""
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


def values(column: Any) -> list[Any]:
    """Returns the values of a column as Python has them: texts as bytes, and Unusable for a value that is none."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if is_text(kind) or is_bytes(kind):
        return undecoded(column)
    return [_value(each) for each in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except Exception:  # a date after the year 9999, a list of texts that are not UTF-8
        return Unusable(CORRUPT)


class Position(NamedTuple):
    """Where to go on in a table, for `read_piece`.

    row: in its group.
    number: rows of the table before it.
    expanded: bytes of the texts before it.
    refused, lost: rows that were rejected, and groups whose reading hung or crashed.
    alone: whether to read no further group in the same piece.
    skip: why to pass over the rest of the group.
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
    """A row: its place in the groups of its table, and its number in all of it, from 0."""

    table: str
    group: int
    row: int
    number: int


def lost(position: Position, reason: str) -> Piece[Position, Any]:
    """Returns what stands in for a piece whose process ended: first its groups are tried one by one."""
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
    make: Callable[[RowAt, dict[str, Any]], R | Rejection],
) -> Piece[Position, R | Rejection]:
    """Returns what `make` makes of the next rows.

    Args:
        choose: which columns are read. Raises Unusable with the reason why the table is refused.
        make: of a row and its values (see `values`).
    """
    try:
        opened = _opened(position.path, position.table)
        columns = choose(opened)
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
    while position.group < opened.groups:
        position, done = _read_group(opened, position, columns, make, results, until, start)
        if opened.limit < position.expanded or MAX_REFUSED < position.refused > position.number / 2:
            if not done or position.group + 1 < opened.groups:
                results.append(Rejection(_name(position), EXPANDS if opened.limit < position.expanded else GIVEN_UP))
            return Piece(results, None)
        if not done:
            return Piece(results, position)
        position = position._replace(group=position.group + 1, row=0, alone=False, skip="")
        if start.alone or _enough(results, position, start, until):
            return Piece(results, position)
    return Piece(results, None)


def _read_group(
    opened: ParquetTable,
    position: Position,
    columns: Sequence[str],
    make: Callable[[RowAt, dict[str, Any]], R | Rejection],
    results: list[R | Rejection],
    until: float,
    start: Position,
) -> tuple[Position, bool]:
    """Adds the rows of one group, and returns the position behind the last, and whether the group is done."""
    rows = None
    try:
        rows = opened.rows(position.group)
        if position.skip:
            raise Unusable(position.skip)
        batches = _going_on(opened, position, columns)
        for batch in batches:
            read = {name: values(batch.column(name)) for name in columns}
            expanded = position.expanded + sum(len(v) for c in read.values() for v in c if isinstance(v, bytes))
            if expanded > opened.limit:
                position = position._replace(expanded=expanded)
                raise Unusable(EXPANDS)
            refused = 0
            for i in range(batch.num_rows):
                fields = {name: column[i] for name, column in read.items()}
                made = make(RowAt(position.table, position.group, position.row + i, position.number + i), fields)
                results.append(made)
                refused += isinstance(made, Rejection)
            position = position._replace(
                row=position.row + batch.num_rows,
                number=position.number + batch.num_rows,
                expanded=expanded,
                refused=position.refused + refused,
            )
            if position.row < rows and _enough(results, position, start, until):
                _kept.append((position[:4], batches))
                return position, False
        if position.row != rows:
            raise Unusable(CORRUPT)
    except Unusable as reason:
        return _refuse(position, max(1, (rows or 0) - position.row), reason, results), True
    return position, True


_kept: list[tuple[tuple[Any, ...], Iterator[Any]]] = []  # at most one iterator, which stands at this position


def _going_on(opened: ParquetTable, position: Position, columns: Sequence[str]) -> Iterator[Any]:
    """Returns the batches of a group from this row on, without decoding those before again where that can be."""
    kept = _kept.pop() if _kept else None
    _kept.clear()
    if kept is not None and kept[0] == position[:4]:
        return kept[1]
    batches = opened.batches(position.group, columns, _BATCH)
    passed = 0
    while passed < position.row:
        batch = next(batches, None)
        if batch is None:
            raise Unusable(CORRUPT)
        passed += batch.num_rows
    return batches


def _enough(results: list[Any], position: Position, start: Position, until: float) -> bool:
    return len(results) >= PIECE_ROWS or position.expanded - start.expanded >= PIECE_BYTES or time.monotonic() > until


def _refuse(position: Position, count: int, why: Unusable, results: list[Any]) -> Position:
    """Rejects the rest of a group; where it says that it has very many rows, in one piece."""
    detail = joined(why.__cause__ or "")
    if count > PIECE_ROWS:
        results.append(Rejection(_name(position), str(why), detail=f"and the {count - 1} rows after it"))
    else:
        rows = range(position.number, position.number + count)
        results += [Rejection(_name(position._replace(number=row)), str(why), detail=detail) for row in rows]
    return position._replace(number=position.number + count, refused=position.refused + min(count, PIECE_ROWS))


def _name(position: Position) -> str:
    return f"{printable(position.table)}/{position.number:06d}"


@lru_cache(1)
def _opened(path: str, table: str) -> ParquetTable:
    return ParquetTable(path, table)
