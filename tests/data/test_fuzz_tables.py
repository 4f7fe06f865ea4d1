"""Mutated tables, tar files, metadata and prompts: each ends as rows and rejections, in bounded time and memory."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lcmlora.data.reading import parquet_files, tables
from lcmlora.data.reading.candidates import Candidate, Rejection, Unusable
from lcmlora.data.sources import parquet, prompts, tars
from lcmlora.io.isolation import Piece
from tests.data.conftest import data_in
from tests.support import fuzzing

ROWS = [{"file_name": f"{n}.png", "text": f'a "quoted" text, {n}, é\n' * (n % 3 + 1), "score": n / 7} for n in range(6)]
_numbers = itertools.count()


def in_a_file(ending: str, content: bytes, use: Callable[[str, str], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A name of its own: what is kept of a file between two pieces is kept by its name.
        name = f"{os.getpid()}-{next(_numbers)}{ending}"
        Path(folder, name).write_bytes(content)
        use(folder, name)


def all_of(read: Callable[[Any], Piece[Any, Any]], place: Any) -> list[Any]:
    found: list[Any] = []
    while place is not None:
        piece = read(place)
        assert piece.rest != place
        found, place = [*found, *piece.results], piece.rest
    assert all(not isinstance(each, Rejection) or (each.name and "\n" not in each.reason) for each in found)
    return found


def read_parquet(content: bytes) -> None:
    def use(folder: str, name: str) -> None:
        found = all_of(lambda place: parquet._read_piece(("score",), place), parquet_files.Position(folder, name))
        reader = parquet.Parquet(data_in(Path(folder), source="parquet"))
        for each in found:
            if isinstance(each, Candidate):
                try:
                    reader.read(each.place)
                except Unusable:
                    continue
        all_of(lambda place: tables._read_piece(None, place), parquet_files.Position(folder, name))

    in_a_file(".parquet", content, use)


def read_tar(content: bytes) -> None:
    def use(folder: str, name: str) -> None:
        reader, alone = tars.Tars(data_in(Path(folder), source="webdataset")), tars._UnmatchedParts()
        for each in all_of(lambda place: tars._read_piece(("score",), place), tars._Position(folder, name)):
            if isinstance(each, tars._Unmatched):
                alone.add(each)
            elif each.place is not None:
                try:
                    reader.read(each.place)
                except Unusable:
                    continue
        alone.rejections()

    in_a_file(".tar", content, use)
    in_a_file(".tar", mended(content), use)


def mended(content: bytes) -> bytes:
    """The same with checksums that are right: without them few changed headers are read."""
    changed = bytearray(content)
    for at in range(0, len(content) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def read_text(ending: str, content: bytes) -> None:
    def use(folder: str, name: str) -> None:
        rows = all_of(lambda place: tables._read_piece(None, place), tables._TextPosition(folder, name, None))
        prompts.distinct_prompts(rows)

    in_a_file(ending, content, use)


def read_jsonl(content: bytes) -> None:
    read_text(".jsonl", content)


def read_csv(content: bytes) -> None:
    read_text(".csv", content)


def read_txt(content: bytes) -> None:
    read_text(".txt", content)


def parquet_examples() -> list[bytes]:
    made = []
    for options in ({"compression": "snappy"}, {"compression": "zstd", "use_dictionary": False}, {"version": "1.0"}):
        for image in ([b"p" * 90] * 6, [{"bytes": b"p" * 90, "path": "x"}] * 6):
            file = io.BytesIO()
            table = pyarrow.table(
                {"text": [r["text"] for r in ROWS], "score": [r["score"] for r in ROWS], "image": image}
            )
            pyarrow.parquet.write_table(table, file, row_group_size=4, **options)
            made.append(file.getvalue())
    return made


def tar_examples() -> list[bytes]:
    made = []
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            for n, row in enumerate(ROWS):
                folder = "é" * 60 if format != tarfile.USTAR_FORMAT and n % 2 else "d"
                for ending, content in (
                    ("png", b"p" * 90),
                    ("txt", row["text"].encode()),
                    ("json", json.dumps(row).encode()),
                ):
                    info = tarfile.TarInfo(f"{folder}/{n}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        made.append(file.getvalue())
    return made


def csv_examples() -> list[bytes]:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["file_name", "text", "score"])
    writer.writeheader()
    writer.writerows(ROWS)
    return [file.getvalue().encode(), b"prompt\none, two\nthree\n", b'\xef\xbb\xbfid,prompt\r\n1,"a ""b"""\r\n2,c\r\n']


JSONL = ["".join(json.dumps(row) + "\n" for row in ROWS).encode(), b'"one"\n{"prompt": "two"}\n\n{"caption": null}\n']
KINDS = {
    "parquet": (read_parquet, parquet_examples, (b"PAR1", b"\x15\0", b"\x15\xff\xff\xff\xff\x0f")),
    "tar": (read_tar, tar_examples, (b"ustar", b"\0" * 512, b"30 size=", b"././@LongLink", b"\x80" + b"\xff" * 11)),
    "csv": (read_csv, csv_examples, (b'""', b'","', b"\r", b";", b"file_name")),
    "jsonl": (read_jsonl, lambda: JSONL, (b'"text"', b"null", b"}\n{", b"\\ud800")),
    "txt": (read_txt, lambda: [b"one\ntwo, three\r\n\n# four\nfive --six\n"], (b"\r", b"\xe2\x80\xa8")),
}


def check(kind: str, count: int) -> None:
    read, examples, words = KINDS[kind]
    counts = fuzzing.check(read, fuzzing.mutated(examples(), count, 21, words))
    assert counts.total() == count


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_inputs_end_as_rows_and_rejections(kind: str) -> None:
    check(kind, fuzzing.QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_mutated_inputs_end_as_rows_and_rejections(kind: str) -> None:
    check(kind, fuzzing.FULL)
