"""The base classes of sources, which read captioned pictures, and functions that use the source of the settings.

Each source is a class that `data.source` names (lcmlora/plugins.py says how to add one). Sources whose pictures are
encoded files, in folders, tables or tar files, derive from `EncodedPictures`; the others derive from `Source`.

The bytes of a picture decide how it is decoded, not its name, and only JPEG, PNG and WebP are. A picture that cannot be
used becomes a `Rejection` with a reason; a mistake of layout (no pictures, no captions) is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lcmlora.config import Data, Launch
from lcmlora.data.preparation.shards import Finished, InputShard, Listing, Spare
from lcmlora.data.preparation.surveying import Found, Listed, Rejections, survey_shards
from lcmlora.data.preparation.working import default_decoders
from lcmlora.data.reading.candidates import Candidate, Rejection, Unusable
from lcmlora.data.reading.tables import PRELOAD
from lcmlora.data.unused_files import Tally, UnusedFiles, tally
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write, temporary_folder
from lcmlora.io.isolation import Lost, Processes
from lcmlora.plugins import SOURCES

if TYPE_CHECKING:
    from PIL import Image

RESIZE_FILTER = "lanczos"

_PIECE_SECONDS = 10.0  # a call of another process has 60
_BAD_SCORE, _UNDECODABLE = 100, 101  # ranks of rejections, after those of all listings


@dataclass(frozen=True)
class Record:
    """One captioned picture that can be used.

    key: unique and stable; a path below `data.path`, with the position in a table or tar file, or style/code/copy of
        an emoji.
    sha256: of the picture's bytes; of an emoji's drawing and placement; of prompt and copy if there is no picture.
    width, height: pixels, upright (after EXIF rotation); 0 if there is no picture.
    place: where the source reads it, if that is not the key.
    raw_caption: as it was written, if cleaning took words from it.
    look: the perceptual hash as 16 hexadecimal digits, if `data.near_duplicates` is set.
    note: what could not be read of the picture, though it is used.
    """

    key: str
    caption: str
    sha256: str
    width: int
    height: int
    place: str | None = None
    raw_caption: str | None = None
    look: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Survey:
    """What a source has at `data.path`.

    records: the usable pictures, in a stable order.
    left_out: names of pictures or files in splits that are not wanted, by split; of many the first ones.
    of_pictures: whether `left_out` has names of pictures; else they are names of files with many pictures.
    unused_files: files that the source does not use, by kind.
    """

    records: list[Record]
    rejections: list[Rejection]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    unused_files: dict[str, Tally] = field(default_factory=dict)
    of_pictures: bool = False


class Source(ABC):
    """A source of captioned pictures, or of captions only. Each process that reads from it opens it again.

    has_pictures: False if the teacher draws the latents of the captions (lcmlora/data/latents/rollouts.py).
    has_sizes: whether pictures have a size of their own; False if they are drawn in any size.
    separate_files: whether each picture is a file of its own, with its caption in another file.
    """

    has_pictures: ClassVar[bool] = True
    has_sizes: ClassVar[bool] = True
    separate_files: ClassVar[bool] = False

    def __init__(self, data: Data) -> None:
        """Reads no picture yet."""
        self.data = data

    @abstractmethod
    def survey(self) -> Survey:
        """Returns all pictures, rejections and unused files at `data.path`. Reads each picture once.

        Raises:
            UserError: there is no such folder or file, it has no pictures, or so many have no caption that the layout
                must be another one (data.max_rejected).
        """

    def picture(self, record: Record, size: int | None = None) -> Image.Image:
        """Returns the picture in RGB and upright, as `decoding.decode` does. May be called from any thread.

        Args:
            size: side in pixels, for sources that draw in any size; by default that of the record.

        Raises:
            UserError: the source has no pictures, or this one changed since the list was made.
        """
        raise UserError(f"data.source: {self.data.source} has no pictures")

    def rejected(self, place: str) -> Image.Image | None:
        """Returns a rejected picture, for people to look at; None if it cannot be decoded."""
        return None

    def readers(self) -> int:
        """Returns how many threads should read pictures at the same time."""
        return default_decoders()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_kind, (type(self), _Settings.of(self.data))


class EncodedPictures(Source):
    """A source whose pictures are JPEG, PNG or WebP. They are decoded in processes that may crash.

    A source needs `candidates` and `read`. One for sets too large for a list in memory has `shards` and `listed`
    instead of `candidates`: then `prepare` reads a shard once, and its memory does not grow with the pictures.

    Attributes:
        left_out: what is in splits that are not wanted, by split; known after `shards`.
        splits_inside: whether shards have folders that name splits, which `split_inside` tells.
    """

    splits_inside: ClassVar[bool] = False

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.left_out: dict[str, Tally] = {}

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        """Returns the pictures with captions, in a stable order, and the rejections; decodes no picture.

        Candidates have the numbers for `data.scores`.

        Raises:
            UserError: there are no pictures, or the files are of another source.
        """
        candidates: list[Candidate] = []
        rejections: list[Rejection] = []
        listed = Listed()
        processes = Processes(1, preload=PRELOAD)
        for shard in self.shards():
            listed.shards += 1
            for each in self.listed(shard, processes):
                if isinstance(each, Candidate):
                    candidates.append(each)
                    listed.candidates += 1
                elif isinstance(each, Rejection):
                    rejections.append(each)
                    listed.add(each, shard.name)
                else:
                    self.take_spare(each)
        processes.close()
        self.check_listed(listed)
        return candidates, sorted([*rejections, *self.refused()], key=lambda each: each.rank)

    @abstractmethod
    def read(self, place: str) -> bytes:
        """Returns the bytes of a candidate's picture. May be called from any thread. Raises Unusable."""

    def shards(self) -> Iterator[InputShard]:
        """Yields the parts that are read by themselves, in a stable order; by default all is one, read in each run.

        Raises:
            UserError: as of `candidates`.
        """
        yield InputShard("", "")

    def listed(self, shard: InputShard, processes: Processes) -> Iterator[Listing]:
        """Yields what `candidates` returns of one shard, and files that it does not use.

        It depends on nothing but the shard and the settings, since it runs in any process, or has run in the past.

        Args:
            processes: for what must not be read in this process.
        """
        for found in self.candidates():
            yield from found

    def refused(self) -> Iterable[Rejection]:
        """Returns the files that are no shard because they must not be read; called after `shards`."""
        return ()

    def take_spare(self, spare: Spare) -> None:
        """Takes note of what `listed` says of a shard, which may have been another process, or an earlier run."""

    def split_inside(self, each: Candidate | Rejection) -> tuple[str, str]:
        """Returns the split that folders in the shard name, or nothing for a rejection, and the name to report."""
        return "", ""

    def unit_of(self, candidate: Candidate) -> str:
        """Returns what is best read as a whole, such as a group of rows."""
        return candidate.place

    def check_listed(self, listed: Listed) -> None:
        """Raises UserError if this is not a data set of this source, given what was listed."""

    def unused_files(self) -> UnusedFiles:
        """Returns the files that the source does not use; called when all shards are listed."""
        return UnusedFiles()

    def survey(self) -> Survey:
        with temporary_folder() as folder:
            found = survey_shards(self, Finished(folder / "finished"), folder, Launch())
            return Survey(
                [Record(**json.loads(line)) for line in found.records],
                [*found.rejections],
                {split: names["first"] for split, names in found.left_out.items()},
                found.unused_files,
                found.of_pictures,
            )

    def picture(self, record: Record, size: int | None = None) -> Image.Image:
        from lcmlora.data.decoding import decode

        del size
        try:
            content = self.read(record.place or record.key)
            if hashlib.sha256(content).hexdigest() != record.sha256:
                raise Unusable("it has changed")
            return decode(content)[0]
        except Unusable as reason:
            raise UserError(
                f"{self.data.path}: {record.key}: {reason}, but it was good when the list was made; run "
                "`lcmlora prepare`"
            ) from None

    def rejected(self, place: str) -> Image.Image | None:
        from lcmlora.data.decoding import decode

        try:
            return decode(self.read(place))[0]
        except Unusable:
            return None

    def examined(self, candidates: Sequence[Candidate], processes: Processes) -> Iterator[bytes | Rejection]:
        """Yields the line of each picture whose scores are in range and that can be decoded, and the rejections."""
        within_scores = []
        for candidate in candidates:
            if reason := _bad_score(candidate, self.data):
                yield Rejection(candidate.key, reason, candidate.place, rank=_BAD_SCORE)
            else:
                within_scores.append(candidate)
        done = 0
        while done < len(within_scores):
            try:
                results = processes.call(partial(_examine_first, self), within_scores[done:])
                yield from results
                done += len(results)
            except Lost:
                # One of them made its process crash, hang or fill its memory: which one shows when each is alone.
                for candidate in within_scores[done:]:
                    done += 1
                    try:
                        yield processes.call(partial(_examine, self), candidate)
                    except Lost as reason:
                        yield Rejection(candidate.key, str(reason), rank=_UNDECODABLE)
                        break


@dataclass(frozen=True)
class _Settings:
    """Settings that are compared by their text, because the dictionary in them has no hash."""

    text: str
    data: Data = field(compare=False)

    @classmethod
    def of(cls, data: Data) -> _Settings:
        return cls(data.model_dump_json(), data)


@lru_cache(1)  # a source keeps files open, and the rows that it read last
def _open_kind(kind: type[Source], settings: _Settings) -> Source:
    return kind(settings.data)


def open_source(data: Data) -> Source:
    """Returns the source of these settings, ready to read. Raises UserError if there is no such path."""
    return _open_kind(SOURCES.get(data.source), _Settings.of(data))


def survey(data: Data) -> Survey:
    """Returns what the source has at `data.path` now; see `Source.survey`."""
    surveyed: Survey = SOURCES.get(data.source)(data).survey()
    return surveyed


def find(data: Data, finished: Finished, folder: Path, launch: Launch) -> Found:
    """Returns what the source has at `data.path` now.

    Args:
        finished: what earlier runs have read; takes what this one reads.
        folder: for files of this run.
        launch: where pictures are read.
    """
    source = SOURCES.get(data.source)(data)
    if isinstance(source, EncodedPictures):
        return survey_shards(source, finished, folder, launch)
    surveyed: Survey = source.survey()
    rejections = Rejections(folder)
    for rejection in surveyed.rejections:
        rejections.add(rejection)
    left_out = {split: tally(names) for split, names in surveyed.left_out.items()}
    records = [record_line(record) for record in surveyed.records]
    return Found(records, rejections, left_out, surveyed.unused_files, surveyed.of_pictures)


def open_picture(data: Data, record: Record, *, size: int | None = None) -> Image.Image:
    """Returns the picture of a record; see `Source.picture`."""
    return open_source(data).picture(record, size)


def _bad_score(candidate: Candidate, data: Data) -> str:
    """Returns which score is missing or out of its range, as a reason; empty if all are in range."""
    for name, (low, high) in ((name, (limits.min, limits.max)) for name, limits in data.scores.items()):
        value = candidate.scores.get(name)
        if value is None:
            return f"no {name} (data.scores)"
        if low is not None and value < low:
            return f"{name} under {low:g} (data.scores)"
        if high is not None and value > high:
            return f"{name} over {high:g} (data.scores)"
    return ""


def _examine_first(source: EncodedPictures, candidates: Sequence[Candidate]) -> list[bytes | Rejection]:
    """Returns the results of the first candidates: as many as can be decoded in a few seconds, one at least."""
    until = time.monotonic() + _PIECE_SECONDS
    results = []
    for candidate in candidates:
        results.append(_examine(source, candidate))
        if time.monotonic() > until:
            break
    return results


def _examine(source: EncodedPictures, candidate: Candidate) -> bytes | Rejection:
    """Returns the line of a candidate, or why it cannot be decoded. Runs in a process that may crash."""
    from PIL import Image

    from lcmlora.data.decoding import decode
    from lcmlora.data.duplicates import perceptual_hash

    try:
        content = source.read(candidate.place)
        # Pillow only warns of pictures over its limit, and refuses those over twice the limit; here the limit counts.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture, note = decode(content)
    except Unusable as reason:
        return Rejection(candidate.key, str(reason), rank=_UNDECODABLE)
    record = Record(
        candidate.key,
        candidate.caption.text,
        hashlib.sha256(content).hexdigest(),
        *picture.size,
        place=None if candidate.place == candidate.key else candidate.place,
        raw_caption=candidate.caption.raw,
        look=None if source.data.near_duplicates is None else f"{perceptual_hash(picture):016x}",
        note=note,
    )
    return record_line(record)


def rejected_thumbnail(source: Source, side: int, place: str) -> bytes | None:
    """Returns a rejected picture as a JPEG of at most `side` pixels; None if it cannot be decoded."""
    picture = source.rejected(place)
    if picture is None:
        return None
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


def fit(picture: Image.Image, height: int, width: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Resizes a picture until it just covers this size, by default a square, and crops its centre.

    Returns:
        The cropped picture, and the top and left of the crop in the resized picture. The filter is RESIZE_FILTER.
    """
    from PIL import Image

    width = width or height
    factor = max(width / picture.width, height / picture.height)
    covering = max(width, round(picture.width * factor)), max(height, round(picture.height * factor))
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    resized = picture.resize(covering, Image.Resampling[RESIZE_FILTER.upper()])
    return resized.crop((left, top, left + width, top + height)), (top, left)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a list that `write_records` wrote. Raises UserError if there is no such list."""
    return [*iter_records(path)]


def iter_records(path: Path) -> Iterator[Record]:
    """Yields what `read_records` returns, one at a time."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield Record(**json.loads(line))
    except FileNotFoundError:
        raise UserError(f"{path}: no such list of pictures; run `lcmlora prepare`") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a list of pictures ({error}); run `lcmlora prepare`") from None


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes one JSON object in each line, with the fields of `Record` that are not None."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.writelines(map(record_line, records))

    atomic_write(path, write)


def record_line(record: Record) -> bytes:
    """Returns the line of a record in a list."""
    # ASCII, because str.splitlines also breaks at characters that JSON leaves bare (U+2028, U+0085).
    plain = {name: value for name, value in vars(record).items() if value is not None}
    return json.dumps(plain, sort_keys=True).encode() + b"\n"
