"""Source `webdataset`: pictures and captions in tar files, as WebDataset lays them out.

Members that follow each other and have one name up to the first dot are one sample: `000123.jpg` with `000123.txt`, or
with `000123.json` that has a caption. Nothing is unpacked to disk, and other members (.pkl, .cls, ...) are not opened.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import IO, Any

from lcmlora.data.candidates import (
    CAPTIONS,
    DAMAGED,
    EMPTY,
    LONG_CAPTION,
    MAX_BYTES,
    MAX_CAPTION,
    NO_CAPTION,
    NOT_UTF8,
    OUTSIDE,
    SUFFIXES,
    TOO_LARGE,
    UNREADABLE,
    Candidate,
    Caption,
    Rejection,
    Unusable,
    clean_caption,
    decoded_caption,
    printable,
    scores_in,
)
from lcmlora.data.remote import Files
from lcmlora.errors import Unavailable, UserError
from lcmlora.progress import track

NO_FILE = "a link or a device in a tar file"
NO_PICTURE = "a sample without a picture"
BAD_JSON = "its JSON cannot be read"
_MAX_JSON = 1 << 20  # bytes; it may have more than a caption
CUT_OFF = "the tar file is damaged from here on"


class Tars:
    """A tar file, or a folder of them. A place is `tar@offset+size`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files = Files(path)

    def candidates(self, scores: Iterable[str] = ()) -> tuple[list[Candidate], list[Rejection]]:
        tars = self._files.list(".tar")
        if not tars:
            raise UserError(f"data.path: {self._path}: no .tar files; those of .tar.gz must be unpacked to .tar first")
        found: list[Candidate] = []
        rejections: list[Rejection] = []
        for tar in track(tars, "read tar files"):
            with self._files.open(tar) as file:
                for each in _samples(tar, file, tuple(scores)):
                    (found if isinstance(each, Candidate) else rejections).append(each)  # type: ignore[arg-type]
        if not found and not rejections:
            raise UserError(f"data.path: {self._path}: no pictures in {len(tars)} tar files")
        return found, rejections

    def read(self, place: str) -> bytes:
        tar, _, where = place.rpartition("@")
        offset, _, size = where.partition("+")
        if not 0 < int(size) <= MAX_BYTES:
            raise Unusable(TOO_LARGE if int(size) else EMPTY)
        try:
            content = self._files.read(tar, int(offset), int(size))
        except Unavailable:
            raise
        except UserError:
            raise Unusable(UNREADABLE) from None
        if len(content) < int(size):
            raise Unusable(DAMAGED)
        return content


def _samples(tar: str, file: IO[bytes], scores: tuple[str, ...]) -> Iterator[Candidate | Rejection]:
    damaged = False

    def members(opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        nonlocal damaged
        try:
            for member in opened:
                vars(opened)["members"].clear()  # which would keep all of them
                yield member
        except (tarfile.TarError, ValueError, OverflowError):  # ValueError: numbers in headers that are none
            damaged = True

    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", ignore_zeros=False) as opened:
            files = (member for member in members(opened) if not member.isdir())
            for key, sample in groupby(files, _key):
                yield from _sample(tar, key, list(sample), file, scores)
            # tarfile takes a header that it cannot read for the end, which is a block of zeros.
            file.seek(opened.offset)  # of the block after the last member
            damaged = damaged or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError:
        damaged = True
    if damaged:
        yield Rejection(tar, CUT_OFF)


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _sample(
    tar: str, key: str, members: list[tarfile.TarInfo], file: IO[bytes], scores: tuple[str, ...]
) -> Iterator[Candidate | Rejection]:
    """Yields the pictures of one sample."""
    pictures = [member for member in members if PurePosixPath(member.name).suffix.lower() in SUFFIXES]
    if not pictures:
        yield Rejection(f"{tar}/{printable(key)}", NO_PICTURE)
    for picture in pictures:
        name = f"{tar}/{printable(picture.name)}"
        try:
            if not picture.isreg() or picture.issparse():
                raise Unusable(NO_FILE)
            if picture.name.startswith("/") or ".." in PurePosixPath(picture.name).parts:
                raise Unusable(OUTSIDE)
            if printable(picture.name) != picture.name:
                raise Unusable(NOT_UTF8)
            caption, told = _told(members, file, scores)
        except Unusable as reason:
            yield Rejection(name, str(reason))
            continue
        place = f"{tar}@{picture.offset_data}+{picture.size}"
        yield Candidate(name, caption, place, scores_in(told, scores))


def _told(members: list[tarfile.TarInfo], file: IO[bytes], scores: tuple[str, ...]) -> tuple[Caption, dict[str, Any]]:
    """Returns the caption of a sample, of several the first, and what its JSON says."""
    caption, told = Caption(""), {}
    for member in members:
        if not member.isreg() or not member.name.endswith((".txt", ".json")):
            continue
        text = member.name.endswith(".txt")
        if caption.text and (text or not scores):
            continue
        if member.size > (MAX_CAPTION if text else _MAX_JSON):
            raise Unusable(LONG_CAPTION if text else BAD_JSON)
        place = file.tell()
        file.seek(member.offset_data)
        content = file.read(member.size)
        file.seek(place)
        if text:
            caption = decoded_caption(content)
            continue
        told = _json(content)
        named = next((told[name] for name in CAPTIONS if isinstance(told.get(name), str)), "")
        if len(named) > MAX_CAPTION:
            raise Unusable(LONG_CAPTION)
        caption = caption if caption.text else clean_caption(named)
    if not caption.text:
        raise Unusable(NO_CAPTION)
    return caption, told


def _json(content: bytes) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        raise Unusable(BAD_JSON) from None
    return told if isinstance(told, dict) else {}
