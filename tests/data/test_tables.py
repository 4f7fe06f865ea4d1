"""Rows of .jsonl, .csv, .txt and .parquet: a damaged one costs itself, a hostile table neither time nor memory."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lcmlora.data.reading import parquet_files, tables
from lcmlora.data.reading.candidates import NOT_UTF8, UNREADABLE, Rejection
from lcmlora.data.reading.tables import Row, read_rows
from lcmlora.io.isolation import CRASHED, TOO_LONG


def read(folder: Path, *names: str, **options: Any) -> dict[str, Any]:
    """The fields of each row by its name, or why it is refused."""
    found = list(read_rows(str(folder), names, **options))
    by_name = {each.name: each.fields if isinstance(each, Row) else each.reason for each in found}
    assert len(by_name) == len(found)
    return by_name


def in_this_process(folder: Path, name: str) -> list[Row | Rejection]:
    place: Any = (
        parquet_files.Position(str(folder), name)
        if name.endswith(".parquet")
        else tables._TextPosition(str(folder), name, None)
    )
    found: list[Row | Rejection] = []
    while place is not None:
        piece = tables._read_piece(None, place)
        assert piece.rest != place
        found, place = [*found, *piece.results], piece.rest
    return found


def test_a_damaged_row_of_csv_costs_itself_and_is_named(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbffile_name, text",
        b"1.png,a cat, in the sun",  # commas without quotes
        b'2.png,"a cat, in the sun"',
        b'3.png,"says ""hi""\nto a dog"',
        b"4.png",
        b"",
        b'5.png,"never closed',
        b'6.png, "after a space, too"',
        b"7.png,caf\xe9",
        b'8.png,"closed" too early',
        b"9.png,",
        b'10.png,a 5" shelf',
        b"11.png,one,",
    ]
    (tmp_path / "metadata.csv").write_bytes(b"\r\n".join(lines))
    assert read(tmp_path, "metadata.csv") == {
        "metadata.csv/000001": tables.MORE_FIELDS,
        "metadata.csv/000002": {"file_name": "2.png", "text": "a cat, in the sun"},
        "metadata.csv/000003": {"file_name": "3.png", "text": 'says "hi"\nto a dog'},
        "metadata.csv/000004": tables.FEWER_FIELDS,
        "metadata.csv/000005": tables.BAD_QUOTES,
        "metadata.csv/000006": {"file_name": "6.png", "text": "after a space, too"},
        "metadata.csv/000007": NOT_UTF8,
        "metadata.csv/000008": tables.BAD_QUOTES,
        "metadata.csv/000009": {"file_name": "9.png", "text": ""},
        "metadata.csv/000010": {"file_name": "10.png", "text": 'a 5" shelf'},
        "metadata.csv/000011": tables.MORE_FIELDS,
    }


def test_the_detail_of_a_rejection_says_which_row_and_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file_name,text\n1.png,a,b\n")
    (rejection,) = read_rows(str(tmp_path), ["a.csv"])
    assert isinstance(rejection, Rejection) and rejection.detail == "row 1: 1.png,a,b"


def test_where_a_csv_has_one_column_a_line_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt\na cat, on a mat\n"a dog, running"\n5" shelf, wide\n"a" b, c\nold\rmac\n')
    assert read(tmp_path, "a.csv") == {
        "a.csv/000001": {"prompt": "a cat, on a mat"},
        "a.csv/000002": {"prompt": "a dog, running"},
        "a.csv/000003": {"prompt": '5" shelf, wide'},
        "a.csv/000004": tables.BAD_QUOTES,
        "a.csv/000005": {"prompt": "old"},
        "a.csv/000006": {"prompt": "mac"},
    }


def test_a_damaged_line_of_jsonl_costs_itself_and_has_its_line_number(tmp_path: Path) -> None:
    lines = [
        b'{"a": 1}', b"", b'{"a"', b'"a text"', b'{"a": "\\ud800"}', b'{"a": "caf\xe9"}', b"[1]", b"[" * 5000,
        b'{"a": "' + b"x" * 3_000_000 + b'"}', b'{"a": NaN, "b": null}', b"\0", b'{"a": ' + b"9" * 5000 + b"}", 
        b'{"a": 2}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert read(tmp_path, "a.jsonl") == {
        "a.jsonl/000001": {"a": 1},
        "a.jsonl/000003": tables.NOT_JSON,
        "a.jsonl/000004": {"": "a text"},
        "a.jsonl/000005": NOT_UTF8,
        "a.jsonl/000006": NOT_UTF8,
        "a.jsonl/000007": tables.NOT_JSON,
        "a.jsonl/000008": tables.NOT_JSON,
        "a.jsonl/000009": tables.LONG_ROW,
        "a.jsonl/000010": {"a": None, "b": None},
        "a.jsonl/000011": tables.NOT_JSON,
        "a.jsonl/000012": tables.NOT_JSON,
        "a.jsonl/000013": {"a": 2},
    }


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", json.dumps([{"a": 1}], indent=1).encode(), tables.ARRAY),
        ("a.jsonl", json.dumps({"a": 1}, indent=1).encode(), tables.ARRAY),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), tables.UTF16),
        ("a.csv", b"\x1f\x8b\x08\0 and so on", tables.COMPRESSED),
        ("a.csv", b"PK\x03\x04 as of a spreadsheet", tables.COMPRESSED),
        ("a.csv", b"file_name;text\n1.png;a\n", tables.SEPARATOR),
        ("a.csv", b"file_name\ttext\n1.png\ta\n", tables.SEPARATOR),
        ("a.csv", b"file_name|text\n1.png|a\n", tables.SEPARATOR),
        ("a.csv", b"text,text\n1,2\n", tables.TWO_COLUMNS),
        ("a.csv", b'"file_name,text\n1.png,a\n', f"{tables.NO_HEADER}: {tables.BAD_QUOTES}"),
        ("a.csv", b"caf\xe9,text\n1.png,a\n", f"{tables.NO_HEADER}: {NOT_UTF8}"),
        ("a.csv", b"x" * 3_000_000, f"{tables.NO_HEADER}: {tables.LONG_ROW}"),
        ("a.parquet", b"PAR1 and no more", parquet_files.NOT_PARQUET),
    ],
)
def test_a_file_that_is_no_such_table_is_one_rejection(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert [(each.name, each.reason) for each in in_this_process(tmp_path, name) if isinstance(each, Rejection)] == [
        (name, reason)
    ]


def test_a_pipe_a_socket_and_a_device_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metadata.jsonl")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    names = ["metadata.jsonl", "pipe.parquet", "device.csv", "gone.csv"]
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(tmp_path, os.O_RDONLY)  # the path of a socket must be short
        listening.bind(f"/proc/self/fd/{here}/socket.txt")
        os.close(here)
        assert read(tmp_path, *names, "socket.txt") == dict.fromkeys([*names, "socket.txt"], UNREADABLE)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.parquet"])
def test_a_table_is_the_same_in_pieces_of_any_size(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {n}" + "\r\nand more," * (n % 3) + " é" for n in range(200)]
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name, row_group_size=70)
    elif name == "a.csv":
        (tmp_path / name).write_text("n,text\r\n" + "".join(f'{n},"{t}"\r\n' for n, t in enumerate(texts)), newline="")
    else:
        (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    whole = in_this_process(tmp_path, name)
    assert len(whole) == 200 and all(isinstance(each, Row) for each in whole)
    for module, rows in ((tables, 1), (tables, 17), (parquet_files, 1), (parquet_files, 64)):
        monkeypatch.setattr(module, "PIECE_ROWS", rows)
        monkeypatch.setattr(parquet_files, "_BATCH", 16)
        monkeypatch.setattr(tables._Lines, "_BLOCK", 7)
        assert in_this_process(tmp_path, name) == whole


def test_fields_are_chosen_by_name_in_any_case_and_columns_of_bytes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"Text": "a", "exif": {"b": 1}}\n')
    table = {"image": [b"\xff"], "picture": [{"bytes": b"\xff", "path": "1.png"}], "TEXT": ["b"], "score": [1.5]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert read(tmp_path, "a.jsonl", "a.parquet", wanted=("text", "image", "picture")) == {
        "a.jsonl/000001": {"Text": "a"},
        "a.parquet/000000": {"TEXT": "b"},
    }
    assert read(tmp_path, "a.parquet") == {"a.parquet/000000": {"TEXT": "b", "score": 1.5}}


def test_a_table_that_is_garbage_throughout_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_REFUSED", 50)
    (tmp_path / "a.jsonl").write_text("x\n" * 1000)
    found = in_this_process(tmp_path, "a.jsonl")
    assert len(found) == 52 and isinstance(found[-1], Rejection) and found[-1].reason == tables.GIVEN_UP


def test_a_group_of_rows_whose_process_ends_costs_itself(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": list("abcdef")}), tmp_path / "a.parquet", row_group_size=2)
    place = parquet_files.Position(str(tmp_path), "a.parquet", group=1, number=2)
    alone = parquet_files.after_loss(place, CRASHED)
    assert not alone.results and alone.rest == place._replace(alone=True)
    assert alone.rest is not None
    skipping = parquet_files.after_loss(alone.rest, CRASHED)
    piece = tables._read_piece(None, skipping.rest)
    assert [(each.name, each.reason) for each in piece.results if isinstance(each, Rejection)] == [
        (f"a.parquet/{row:06d}", f"its group of rows {CRASHED}") for row in (2, 3)
    ]
    assert [each.name for each in tables._read_piece(None, piece.rest).results] == [
        "a.parquet/000004",
        "a.parquet/000005",
    ]
    (rejection,) = tables._after_loss(tables._TextPosition("x", "a.csv", None, number=7), TOO_LONG).results
    assert isinstance(rejection, Rejection) and rejection.name == "a.csv/000008" and TOO_LONG in rejection.reason


@pytest.mark.slow
def test_a_line_of_three_gigabytes_costs_itself(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        file.truncate(3 << 30)
        file.seek(3 << 30)
        file.write(b'"}\n{"a": 2}\n')
    assert read(tmp_path, "a.jsonl") == {
        "a.jsonl/000001": {"a": 1}, "a.jsonl/000002": tables.LONG_ROW, "a.jsonl/000003": {"a": 2},
    }  # fmt: skip
