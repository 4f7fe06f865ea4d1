"""Parquet files that are damaged or hostile: they cost their own rows, and neither minutes nor gigabytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lcmlora.data.prepare import prepare_pictures
from lcmlora.data.reading import parquet_files
from lcmlora.data.reading.candidates import NO_CAPTION, Candidate, Unusable
from lcmlora.data.reading.parquet_files import Position
from lcmlora.data.sources import parquet
from lcmlora.data.sources.parquet import Parquet
from lcmlora.errors import UserError
from tests.data.conftest import data_in
from tests.data.test_bulk_sources import png

TEXTS = [f"subject {n}" for n in range(8)]
PICTURES = [png(n) for n in range(8)]


def written(path: Path, *, rows: int = 3, **table: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=rows)
    return path


def told(folder: Path, name: str) -> dict[str, str]:
    """The caption of each row, or why it is refused, and of those with a caption the length of the picture."""
    position: Position | None = Position(str(folder), name)
    found: dict[str, str] = {}
    reader = Parquet(data_in(folder, source="parquet"))
    while position is not None:
        piece = parquet._read_piece((), position)
        assert piece.rest != position
        for each in piece.results:
            if isinstance(each, Candidate):
                try:
                    found[each.key] = f"{each.caption.text}: {len(reader.read(each.place))}"
                except Unusable as reason:
                    found[each.key] = str(reason)
            else:
                found[each.name] = each.reason
        position = piece.rest
    return {key.removeprefix(f"{name}/"): value for key, value in found.items()}


def good(rows: range) -> dict[str, str]:
    return {f"{n:06d}": f"subject {n}: {len(PICTURES[n])}" for n in rows}


@pytest.mark.parametrize(
    "captions",
    [
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array(TEXTS, pyarrow.string_view()),
        pyarrow.array(TEXTS).dictionary_encode(),
        pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode(),
        pyarrow.array(TEXTS, pyarrow.binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_captions_of_every_type_of_text_are_read(tmp_path: Path, captions: Any) -> None:
    written(tmp_path / "a.parquet", Caption=captions, image=PICTURES)
    assert told(tmp_path, "a.parquet") == good(range(8))


@pytest.mark.parametrize(
    "pictures",
    [
        pyarrow.array(PICTURES, pyarrow.large_binary()),
        pyarrow.array(PICTURES, pyarrow.binary_view()),
        pyarrow.array(PICTURES, pyarrow.binary()).dictionary_encode(),
        pyarrow.array([{"path": "x", "bytes": p} for p in PICTURES]),
        pyarrow.array([{"bytes": p} for p in PICTURES], pyarrow.struct([("bytes", pyarrow.large_binary())])),
    ],
    ids=lambda column: str(column.type)[:40],
)
def test_pictures_of_every_type_of_bytes_are_read(tmp_path: Path, pictures: Any) -> None:
    written(tmp_path / "a.parquet", image=["by a path"] * 8, caption=TEXTS, JPG=pictures)
    assert told(tmp_path, "a.parquet") == good(range(8))


def test_of_several_columns_of_captions_the_first_with_a_text_counts(tmp_path: Path) -> None:
    caption = pyarrow.array([None, " ", "own", None], pyarrow.string())
    written(tmp_path / "a.parquet", text=["one", "two", "three", None], caption=caption, image=PICTURES[:4])
    expected = ["one", "two", "own"]
    assert told(tmp_path, "a.parquet") == {
        f"{n:06d}": f"{text}: {len(PICTURES[n])}" for n, text in enumerate(expected)
    } | {"000003": NO_CAPTION}


def damage(path: Path, group: int, column: str) -> None:
    """Changes every byte of a column's page."""
    chunks = pyarrow.parquet.ParquetFile(path).metadata.row_group(group)
    chunk = next(c for c in (chunks.column(i) for i in range(chunks.num_columns)) if c.path_in_schema == column)
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset + 30
    for i in range(start, chunk.data_page_offset + chunk.total_compressed_size):
        content[i] ^= 0xA5
    path.write_bytes(content)


@pytest.mark.parametrize("column", ["caption", "image"])
def test_a_damaged_page_costs_its_group_of_rows(tmp_path: Path, column: str) -> None:
    table = pyarrow.table({"caption": TEXTS, "image": PICTURES})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=3, use_dictionary=False, compression="snappy")
    damage(path, 1, column)
    found = told(tmp_path, "a.parquet")
    assert {name: found[name] for name in found if found[name] != parquet_files.CORRUPT} == good(range(3)) | good(
        range(6, 8)
    )
    assert sorted(name for name in found if found[name] == parquet_files.CORRUPT) == ["000003", "000004", "000005"]


def test_the_other_tables_are_read_and_the_report_counts_what_is_lost(tmp_path: Path) -> None:
    for number in range(3):
        pictures = [png(10 * number + n) for n in range(4)]
        written(tmp_path / f"in/{number}.parquet", caption=[f"{number} {n}" for n in range(4)], image=pictures)
    cut = tmp_path / "in/1.parquet"
    cut.write_bytes(cut.read_bytes()[:-300])
    written(tmp_path / "in/3.parquet", caption=pyarrow.array([], pyarrow.string()), image=pyarrow.array([], "binary"))
    written(tmp_path / "in/4.parquet", label=["x"], image=[png(99)])
    report = prepare_pictures(data_in(tmp_path / "in", source="parquet"), 1, tmp_path / "out")
    assert (report["read"], report["kept"]) == (10, 8)
    assert {reason: dropped["first"] for reason, dropped in report["dropped"].items()} == {
        parquet_files.NOT_PARQUET: ["1.parquet"],
        parquet.NO_COLUMN: ["4.parquet"],
    }


def test_tables_that_say_more_than_their_bytes_can_be_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "_BYTES", 1 << 24)
    nothing = pyarrow.nulls(4_000_000, pyarrow.string())
    written(tmp_path / "rows.parquet", rows=4_000_000, caption=nothing, image=nothing.cast(pyarrow.binary()))
    assert (tmp_path / "rows.parquet").stat().st_size < 20_000
    assert set(told(tmp_path, "rows.parquet").values()) == {parquet_files.EXPANDS}
    # Gigabytes of one text: a page of 60,000 times the same index of a dictionary.
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 60_000, pyarrow.int32()), ["x" * 60_000])
    bomb = pyarrow.table({"caption": same, "image": pyarrow.array([b"x"] * 60_000)})
    pyarrow.parquet.write_table(bomb, tmp_path / "bytes.parquet", compression="zstd")
    assert (tmp_path / "bytes.parquet").stat().st_size < 20_000
    assert [each.reason for each in pieces(tmp_path, "bytes.parquet")] == [parquet_files.EXPANDS]


def pieces(folder: Path, name: str) -> list[Any]:
    position: Position | None = Position(str(folder), name)
    found: list[Any] = []
    while position is not None:
        piece = parquet._read_piece((), position)
        found, position = [*found, *piece.results], piece.rest
    return found


def test_pictures_that_expand_to_gigabytes_cost_themselves(tmp_path: Path) -> None:
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, pyarrow.int32()), [b"\0" * (100 << 20)])
    table = pyarrow.table({"caption": [f"text {n}" for n in range(100)], "image": same})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    found = told(tmp_path, "a.parquet")
    assert len(found) == 100 and set(found.values()) == {parquet_files.EXPANDS}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": [b""], "captions": [["t"]]}, "no column of a caption.*got image, captions"),
        ({"image": [b""], "caption": [["t"]]}, "column caption has list.*expected texts"),
        ({"images": [[b""]], "caption": ["t"]}, "no column of pictures.*got images, caption"),
        ({"url": ["x"], "caption": ["t"]}, r"has addresses \(url\) and no pictures.*img2dataset"),
    ],
)
def test_where_no_table_has_the_columns_the_line_names_those_there_are(
    tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    written(tmp_path / "a.parquet", **table)
    with pytest.raises(UserError, match=message):
        Parquet(data_in(tmp_path, source="parquet")).candidates()


def test_pictures_are_read_in_any_order_and_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a.parquet", rows=8, caption=TEXTS, image=PICTURES)
    monkeypatch.setattr(parquet, "_BATCH", 1)
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 2 * len(PICTURES[0]))
    reader = Parquet(data_in(tmp_path, source="parquet"))
    for row in (0, 3, 2, 7, 0, 6, 5, 7):
        assert reader.read(f"a.parquet@0+{row}") == PICTURES[row]
        assert len(reader._groups["a.parquet", 0]._kept) <= 3
    with pytest.raises(Unusable, match=parquet_files.CORRUPT):
        reader.read("a.parquet@0+8")
    with pytest.raises(Unusable, match=parquet_files.CORRUPT):
        reader.read("a.parquet@1+0")
