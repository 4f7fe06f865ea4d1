"""Source `folder`: pictures with a caption beside each, or with metadata.jsonl or metadata.csv."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lcmlora.data.candidates import (
    EMPTY,
    LONG_CAPTION,
    MAX_BYTES,
    MAX_CAPTION,
    MISSING,
    NOT_UTF8,
    OUTSIDE,
    SUFFIXES,
    TOO_LARGE,
    TWICE,
    UNREADABLE,
    Candidate,
    Rejection,
    Unusable,
    clean_caption,
    decoded_caption,
    printable,
)
from lcmlora.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv")


class Folder:
    """A folder of this machine; nothing that leads out of it is followed. A place is a path below it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        folder = self._path
        if not folder.is_dir():
            raise UserError(f"data.path: {folder} is not a folder; source folder needs one with pictures and captions")
        root = folder.resolve()
        files = [p for p in root.rglob("*") if not p.is_dir() and not _hidden(root, p)]
        captions, rejections = _metadata_captions(root, [p for p in files if p.name in _METADATA])
        pictures = {p for p in files if p.suffix.lower() in SUFFIXES} | set(captions)
        if not pictures:
            raise UserError(f"{folder}: no pictures (JPEG, PNG or WebP) in this folder or below it")
        found, bare = [], []
        for path in sorted(pictures):
            key = path.relative_to(root).as_posix()
            try:
                _check(root, path)
                caption = captions.get(path) or _caption_beside(root, path)
                if len(caption) > MAX_CAPTION:
                    raise Unusable(LONG_CAPTION)
            except Unusable as reason:
                rejections.append(Rejection(printable(key), str(reason)))
                continue
            if caption:
                found.append(Candidate(key, caption, key))
            else:
                bare.append(key)
        if bare:
            names = ", ".join(bare[:3]) + (", ..." if len(bare) > 3 else "")
            raise UserError(
                f"{folder}: {len(bare)} of {len(bare) + len(found)} pictures have no caption ({names}); put it into a "
                ".txt file of the same name, or into metadata.jsonl or metadata.csv with file_name and text"
            )
        return found, rejections

    def read(self, place: str) -> bytes:
        try:
            path = self._path / place
            size = path.stat().st_size
            if not 0 < size <= MAX_BYTES:
                raise Unusable(TOO_LARGE if size else EMPTY)
            return path.read_bytes()
        except OSError:
            raise Unusable(UNREADABLE) from None


def _hidden(root: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _check(root: Path, path: Path) -> None:
    try:
        if not path.is_file():
            raise Unusable(MISSING)
    except OSError:  # a name too long
        raise Unusable(MISSING) from None
    if not path.resolve().is_relative_to(root):
        raise Unusable(OUTSIDE)
    if printable(str(path)) != str(path):
        raise Unusable(NOT_UTF8)


def _caption_beside(root: Path, path: Path) -> str:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return ""
    _check(root, beside)
    try:
        with beside.open("rb") as file:
            return decoded_caption(file.read(MAX_CAPTION + 1))
    except OSError:
        raise Unusable(UNREADABLE) from None


def _metadata_captions(root: Path, tables: list[Path]) -> tuple[dict[Path, str], list[Rejection]]:
    """Returns the caption of every picture that a metadata file names, whether there is such a file or not."""
    captions: dict[Path, str] = {}
    rejections = []
    for table in sorted(tables):
        if not table.resolve().is_relative_to(root):
            raise UserError(f"{table}: is a link out of the folder; put the file itself there")
        for name, text in _rows(table):
            path = Path(os.path.normpath(table.parent / name))
            if not path.is_relative_to(root):
                rejections.append(Rejection(printable(name), OUTSIDE))
            elif path in captions:
                rejections.append(Rejection(printable(name), TWICE))
            else:
                captions[path] = clean_caption(text)
    return captions, rejections


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """Yields (file_name, text) of every row of a metadata file."""
    number = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = (
                csv.DictReader(file) if table.suffix == ".csv" else (json.loads(line) for line in file if line.strip())
            )
            for number, row in enumerate(rows, start=1):
                name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
                if not isinstance(name, str) or not isinstance(text, str):
                    raise UserError(f"{table}: row {number}: expected texts file_name and text, got {str(row)[:200]}")
                yield name, text
    except (ValueError, RecursionError, csv.Error, OSError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{table}: cannot be read after row {number}: {error}") from None
