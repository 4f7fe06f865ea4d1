"""Source `webdataset`: pictures and captions in tar files, as WebDataset lays them out.

Members that follow each other and have one name up to the first dot are one sample (samples.py): `000123.jpg` with
`000123.txt`, or with `000123.json` that has a caption. Nothing is unpacked to disk, and other members (.pkl, .cls, ...)
are not opened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import IO, NamedTuple

from lcmlora.config import Data
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
from lcmlora.data.reading.parquet_files import GIVEN_UP, MAX_REFUSED
from lcmlora.data.reading.tables import PRELOAD
from lcmlora.data.reading.tar_members import Member, members
from lcmlora.data.reading.tar_samples import sample_key, sort_out, stem
from lcmlora.data.sources import splits
from lcmlora.data.sources.inputs import InputFiles
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.data.unused_files import UnusedFiles
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.isolation import Piece, in_pieces, processes
from lcmlora.io.remote import Files
from lcmlora.progress import track

NO_FILE = "a link or a device in a tar file"
NO_PICTURE = "a sample without a picture"
APART = (
    "its caption is elsewhere in the tar file; sort it, since a sample's files must follow each other (tar --sort=name)"
)
TWICE = "a second picture of one name in a tar file; the first counts"

_PIECE_PICTURES = 20_000
_PIECE_SECONDS = 10.0  # a bucket may be slow, and a piece has 60 seconds
_MAX_SAMPLE = 100_000  # members, where all names have one beginning


class Tars(EncodedPictures):
    """A tar file, or a folder of them. A place is `tar@offset+size`."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._path = data.path
        self._files = InputFiles(data.path, data.links, data.split)

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        candidates, rejections = self._members()
        # Of what is packed, as `tar c train test` does, unless the name of the tar file says what all of it is.
        inside = {candidate.key: _inside(candidate) for candidate in candidates}
        kept, unwanted = splits.choose(self._path, inside.values(), self.data.split)
        wanted, left_out = {*kept}, dict(self._files.left_out)
        for split, names in unwanted.items():
            left_out[split] = [*left_out.get(split, []), *names]
        self.left_out = left_out
        rejections = [rejection for rejection in rejections if _split_in_tar(rejection.name) not in unwanted]
        found = [candidate for candidate in candidates if inside[candidate.key] in wanted]
        return found, rejections + self._files.rejections()

    def unused_files(self) -> UnusedFiles:
        return self._files.unused_files()

    def _members(self) -> tuple[list[Candidate], list[Rejection]]:
        tars = self._files.list(".tar")
        if not tars:
            raise UserError(
                f"data.path: {self._path}: no .tar files; those of .tar.gz, .tgz, ... must be unpacked to .tar first"
            )
        places = [_Place(self._path, tar) for tar in track(tars, "read tar files")]
        read = partial(_read, tuple(self.data.scores))
        found: dict[str, Candidate] = {}
        rejections: list[Rejection] = []
        alone = _Alone()
        for each in in_pieces(read, places, _lost, processes(len(tars)), preload=PRELOAD):
            if isinstance(each, _Half):
                alone.add(each)
            elif isinstance(each, Rejection):
                rejections.append(each)
            elif each.key in found:
                rejections.append(Rejection(each.key, TWICE, each.place))
            else:
                found[each.key] = each
        rejections += alone.rejections()
        if not found and not rejections:
            raise UserError(f"data.path: {self._path}: no pictures in {len(tars)} tar files")
        return list(found.values()), rejections

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


def _split_in_tar(name: str) -> str | None:
    tar, ending, member = name.partition(".tar/")
    return splits.of(member) if ending and not splits.of(f"{tar}.tar", container=True) else None


def _inside(candidate: Candidate) -> str:
    """Returns the name of a picture in its tar file, below a folder that says the split where the tar file does."""
    tar = candidate.place.rpartition("@")[0]
    name = candidate.key.removeprefix(f"{printable(tar)}/")
    split = splits.of(tar, container=True)
    return f"{split}/{name}" if split else name


class _Place(NamedTuple):
    """Where to go on in a tar file.

    start: the first header of the next member, in bytes.
    seen, refused: samples before it, and pictures and captions of them that were rejected.
    """

    path: str
    tar: str
    start: int = 0
    seen: int = 0
    refused: int = 0


class _Half(NamedTuple):
    """A picture without a caption (with a name), or a caption without a picture, which may belong to each other."""

    tar: str
    stem: str
    picture: str | None
    place: str | None = None


class _Alone:
    """Pictures without a caption and captions without a picture in their sample. If the other half is in another sample
    of the tar file, the rejection says so."""

    def __init__(self) -> None:
        self._pictures: list[_Half] = []
        self._captions: dict[tuple[str, str], None] = {}

    def add(self, half: _Half) -> None:
        if half.picture is not None:
            self._pictures.append(half)
        else:
            self._captions[half.tar, half.stem] = None

    def rejections(self) -> list[Rejection]:
        found = []
        apart = set()
        for half in self._pictures:
            stems = {(half.tar, half.stem), (half.tar, sample_key(half.stem))} & self._captions.keys()
            apart |= stems
            found.append(Rejection(half.picture or "", APART if stems else NO_CAPTION, half.place))
        bare = (each for each in self._captions if each not in apart)
        return found + [Rejection(f"{printable(tar)}/{printable(name)}", NO_PICTURE) for tar, name in bare]


def _read(scores: tuple[str, ...], place: _Place) -> Piece[_Place, Candidate | Rejection | _Half]:
    """Reads samples until there are enough for one piece, and says where to go on."""
    results: list[Candidate | Rejection | _Half] = []
    until = time.monotonic() + _PIECE_SECONDS
    seen, refused = place.seen, place.refused
    try:
        with Files(place.path).open(place.tar) as file:
            for start, key, sample in _samples(members(file, place.start)):
                if isinstance(sample, Unusable):
                    return Piece([*results, Rejection(printable(place.tar), str(sample))], None)
                if len(results) >= _PIECE_PICTURES or time.monotonic() > until:
                    return Piece(results, place._replace(start=start, seen=seen, refused=refused))
                made = list(_sample(place.tar, key, sample, file, scores))
                results += made
                seen += len(made)
                refused += sum(not isinstance(each, Candidate) for each in made)
                if refused > MAX_REFUSED and 2 * refused > seen:
                    return Piece([*results, Rejection(printable(place.tar), GIVEN_UP)], None)
    except Unavailable:
        raise
    except UserError as error:
        return Piece([*results, Rejection(printable(place.tar), UNREADABLE, detail=str(error))], None)
    return Piece(results, None)


def _lost(place: _Place, reason: str) -> Piece[_Place, Candidate | Rejection | _Half]:
    return Piece([Rejection(printable(place.tar), f"from byte {place.start} on, {reason}")], None)


def _samples(found: Iterator[Member]) -> Iterator[tuple[int, str, list[Member] | Unusable]]:
    """Yields each sample with where it begins and its key; at last, where the rest cannot be read, the reason."""
    key, sample = "", list[Member]()
    wrong = None
    while True:
        try:
            member = next(found, None)
        except Unusable as reason:
            member, wrong = None, reason
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
    if wrong is not None:
        yield 0, "", wrong


def _hidden(name: str) -> bool:
    """Whether it is what macOS puts between the members of a sample (._0001.png), or otherwise hidden."""
    base = name.rpartition("/")[2]
    return base.startswith(".")


def _sample(
    tar: str, key: str, sample: list[Member], file: IO[bytes], scores: tuple[str, ...]
) -> Iterator[Candidate | Rejection | _Half]:
    """Yields the pictures of one sample, and what has no other half."""

    def read(member: Member) -> bytes:
        place = file.tell()
        file.seek(member.offset)
        content = file.read(member.size)
        file.seek(place)
        return content

    found = sort_out(key, sample, read, scores=bool(scores))
    for picture, caption, told in found.captioned:
        name = f"{printable(tar)}/{printable(picture.name)}"
        try:
            _check(picture)
        except Unusable as reason:
            yield Rejection(name, str(reason))
        else:
            yield Candidate(name, caption, f"{tar}@{picture.offset}+{picture.size}", scores_in(told, scores))
    for picture, why in found.refused:
        name, place = f"{printable(tar)}/{printable(picture.name)}", f"{tar}@{picture.offset}+{picture.size}"
        try:
            _check(picture)
        except Unusable as other:
            yield Rejection(name, str(other))
        else:
            yield _Half(tar, stem(picture.name), name, place) if why is None else Rejection(name, why, place)
    for name in found.unused:
        yield _Half(tar, name, None)
    if not (found.captioned or found.refused or found.unused):
        yield Rejection(f"{printable(tar)}/{printable(key)}", NO_PICTURE)


def _check(picture: Member) -> None:
    """Raises Unusable where a picture is none that may be read."""
    if not picture.plain:
        raise Unusable(NO_FILE)
    if picture.name.startswith("/") or ".." in picture.name.split("/"):
        raise Unusable(OUTSIDE)
    if printable(picture.name) != picture.name:
        raise Unusable(NOT_UTF8)
