"""Source `webdataset`: pictures and captions in tar files, as WebDataset lays them out.

Members that follow each other and have the same name up to the first dot are one sample (tar_samples.py): `000123.jpg`
with `000123.txt`, or with a `000123.json` that has a caption. Nothing is unpacked to disk, and other members (.pkl,
.cls, ...) are not read.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import IO, NamedTuple

from lcmlora.config import Data
from lcmlora.data.preparation.shards import InputShard
from lcmlora.data.preparation.surveying import Listed
from lcmlora.data.reading.candidates import (
    DAMAGED,
    EMPTY,
    MAX_BYTES,
    NO_CAPTION,
    NOT_UTF8,
    OUTSIDE,
    TOO_LARGE,
    UNREADABLE,
    Candidate,
    Rejection,
    Unusable,
    printable,
    scores_in,
)
from lcmlora.data.reading.file_names import stem
from lcmlora.data.reading.parquet_files import GIVEN_UP, MAX_REFUSED
from lcmlora.data.reading.tar_members import Member, read_members
from lcmlora.data.reading.tar_samples import match_captions, sample_key
from lcmlora.data.sources import split_names
from lcmlora.data.sources.inputs import InputFiles
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.data.unused_files import UnusedFiles, tally
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.isolation import Piece, Processes
from lcmlora.io.remote import Files

NO_FILE = "a link or a device in a tar file"
NO_PICTURE = "a sample without a picture"
CAPTION_ELSEWHERE = (
    "its caption is elsewhere in the tar file; sort it, since a sample's files must follow each other (tar --sort=name)"
)
SECOND_PICTURE = "a second picture of one name in a tar file; the first counts"

_PIECE_PICTURES = 20_000
_PIECE_SECONDS = 10.0  # a bucket may be slow, and a piece has 60 seconds
_MAX_SAMPLE = 100_000  # members, if all names have the same beginning
_UNMATCHED, _BARE, _REFUSED = 1, 2, 3  # ranks of rejections


class Tars(EncodedPictures):
    """A tar file, or a folder of them. A place is `tar@offset+size`. A shard is a tar file."""

    splits_inside = True

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._path = data.path
        self._files = InputFiles(data.path, data.links, data.split)

    def shards(self) -> Iterator[InputShard]:
        tars = self._files.list(".tar")
        if not tars:
            raise UserError(
                f"data.path: {self._path}: no .tar files; those of .tar.gz, .tgz, ... must be unpacked to .tar first"
            )
        self.left_out = {split: tally(names) for split, names in self._files.left_out.items()}
        yield from self._files.shards(tars)

    def listed(self, shard: InputShard, processes: Processes) -> Iterator[Candidate | Rejection]:
        seen: set[str] = set()
        unmatched = _UnmatchedParts()
        read = partial(_read_piece, tuple(self.data.scores))
        for each in processes.pieces(read, _Position(self._path, shard.content), _after_loss):
            if isinstance(each, _Unmatched):
                unmatched.add(each)
            elif isinstance(each, Rejection):
                yield each
            elif each.key in seen:
                yield Rejection(each.key, SECOND_PICTURE, each.place)
            else:
                seen.add(each.key)
                yield each
        yield from unmatched.rejections()

    def refused(self) -> Iterable[Rejection]:
        return [replace(rejection, rank=_REFUSED) for rejection in self._files.rejections()]

    def split_inside(self, each: Candidate | Rejection) -> tuple[str, str]:
        # Folders in a tar file (`tar c train test`) name splits, unless the name of the tar file does.
        if isinstance(each, Rejection):
            return _split_in_tar(each.name) or "", each.name
        name = _name_in_tar(each)
        return split_names.split_of(name) or split_names.TRAIN, name

    def check_listed(self, listed: Listed) -> None:
        if not (listed.candidates or listed.rejections):
            raise UserError(f"data.path: {self._path}: no pictures in {listed.shards} tar files")

    def unused_files(self) -> UnusedFiles:
        return self._files.unused_files()

    def read(self, place: str) -> bytes:
        tar, _, byte_range = place.rpartition("@")
        offset, _, size = byte_range.partition("+")
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


def _split_in_tar(name: str) -> str | None:
    """Returns the split that a folder in a tar file names, for a rejection's name; None if the tar file names one."""
    tar, ending, member = name.partition(".tar/")
    return split_names.split_of(member) if ending and not split_names.split_of(f"{tar}.tar", container=True) else None


def _name_in_tar(candidate: Candidate) -> str:
    """Returns the name of a picture in its tar file, below a folder with the split if the tar file's name has one."""
    tar = candidate.place.rpartition("@")[0]
    name = candidate.key.removeprefix(f"{printable(tar)}/")
    split = split_names.split_of(tar, container=True)
    return f"{split}/{name}" if split else name


class _Position(NamedTuple):
    """Where the next piece of a tar file begins.

    start: the byte at which the next member's first header begins.
    seen, refused: results before it, and those among them that were not candidates.
    """

    path: str
    tar: str
    start: int = 0
    seen: int = 0
    refused: int = 0


class _Unmatched(NamedTuple):
    """A picture without a caption in its sample, or a caption without a picture.

    stem: its name up to the last dot.
    picture: the picture's name; None for a caption.
    """

    tar: str
    stem: str
    picture: str | None
    place: str | None = None


class _UnmatchedParts:
    """Pictures without a caption and captions without a picture in their samples. If a picture's caption is in another
    sample of the tar file, the rejection says so."""

    def __init__(self) -> None:
        self._pictures: list[_Unmatched] = []
        self._captions: dict[tuple[str, str], None] = {}  # ordered

    def add(self, part: _Unmatched) -> None:
        if part.picture is not None:
            self._pictures.append(part)
        else:
            self._captions[part.tar, part.stem] = None

    def rejections(self) -> Iterator[Rejection]:
        elsewhere = set()
        for part in self._pictures:
            captions = {(part.tar, part.stem), (part.tar, sample_key(part.stem))} & self._captions.keys()
            elsewhere |= captions
            reason = CAPTION_ELSEWHERE if captions else NO_CAPTION
            yield Rejection(part.picture or "", reason, part.place, rank=_UNMATCHED)
        bare = (caption for caption in self._captions if caption not in elsewhere)
        for tar, name in bare:
            yield Rejection(f"{printable(tar)}/{printable(name)}", NO_PICTURE, rank=_BARE)


def _read_piece(scores: tuple[str, ...], position: _Position) -> Piece[_Position, Candidate | Rejection | _Unmatched]:
    """Reads samples until there are enough for one piece; returns them and where the next piece begins."""
    results: list[Candidate | Rejection | _Unmatched] = []
    until = time.monotonic() + _PIECE_SECONDS
    seen, refused = position.seen, position.refused
    try:
        with Files(position.path).open(position.tar) as file:
            for start, key, sample in _samples(read_members(file, position.start)):
                if isinstance(sample, Unusable):
                    return Piece([*results, Rejection(printable(position.tar), str(sample))], None)
                if len(results) >= _PIECE_PICTURES or time.monotonic() > until:
                    return Piece(results, position._replace(start=start, seen=seen, refused=refused))
                parts = list(_sample(position.tar, key, sample, file, scores))
                results += parts
                seen += len(parts)
                refused += sum(not isinstance(part, Candidate) for part in parts)
                if refused > MAX_REFUSED and 2 * refused > seen:
                    return Piece([*results, Rejection(printable(position.tar), GIVEN_UP)], None)
    except Unavailable:
        raise
    except UserError as error:
        return Piece([*results, Rejection(printable(position.tar), UNREADABLE, detail=str(error))], None)
    return Piece(results, None)


def _after_loss(position: _Position, reason: str) -> Piece[_Position, Candidate | Rejection | _Unmatched]:
    """Returns the piece that stands in for one whose process crashed or hung: the rest of the file is not read."""
    return Piece([Rejection(printable(position.tar), f"from byte {position.start} on, {reason}")], None)


def _samples(members: Iterator[Member]) -> Iterator[tuple[int, str, list[Member] | Unusable]]:
    """Yields where each sample begins, its key and its members; if the rest cannot be read, at last the reason."""
    key, sample = "", list[Member]()
    failure = None
    while True:
        try:
            member = next(members, None)
        except Unusable as reason:
            member, failure = None, reason
        if member is not None and _hidden(member.name):
            continue
        if sample and (
            member is None
            or sample_key(member.name) != key
            or (len(sample) >= _MAX_SAMPLE and stem(member.name) != stem(sample[-1].name))
        ):
            yield sample[0].start, key, sample
            sample = []
        if member is None:
            break
        key = sample_key(member.name)
        sample.append(member)
    if failure is not None:
        yield 0, "", failure


def _hidden(name: str) -> bool:
    """Returns whether a member is hidden, such as those that macOS adds to the members of a sample (._0001.png)."""
    return name.rpartition("/")[2].startswith(".")


def _sample(
    tar: str, key: str, sample: list[Member], file: IO[bytes], scores: tuple[str, ...]
) -> Iterator[Candidate | Rejection | _Unmatched]:
    """Yields the pictures of one sample, and the pictures and captions that match no other part of it."""

    def read(member: Member) -> bytes:
        before = file.tell()
        file.seek(member.offset)
        content = file.read(member.size)
        file.seek(before)
        return content

    matched = match_captions(key, sample, read, scores=bool(scores))
    for picture, caption, json in matched.captioned:
        name = f"{printable(tar)}/{printable(picture.name)}"
        try:
            _check(picture)
        except Unusable as unusable:
            yield Rejection(name, str(unusable))
        else:
            yield Candidate(name, caption, f"{tar}@{picture.offset}+{picture.size}", scores_in(json, scores))
    for picture, reason in matched.refused:
        name, place = f"{printable(tar)}/{printable(picture.name)}", f"{tar}@{picture.offset}+{picture.size}"
        try:
            _check(picture)
        except Unusable as unusable:
            yield Rejection(name, str(unusable))
        else:
            yield _Unmatched(tar, stem(picture.name), name, place) if reason is None else Rejection(name, reason, place)
    for name in matched.bare_captions:
        yield _Unmatched(tar, name, None)
    if not (matched.captioned or matched.refused or matched.bare_captions):
        yield Rejection(f"{printable(tar)}/{printable(key)}", NO_PICTURE)


def _check(picture: Member) -> None:
    """Raises Unusable if a picture must not be read."""
    if not picture.plain:
        raise Unusable(NO_FILE)
    if picture.name.startswith("/") or ".." in picture.name.split("/"):
        raise Unusable(OUTSIDE)
    if printable(picture.name) != picture.name:
        raise Unusable(NOT_UTF8)
