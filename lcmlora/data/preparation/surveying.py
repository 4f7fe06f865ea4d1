"""Reads a source shard by shard, and keeps what it has in files: the memory does not grow with the pictures."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from lcmlora.config import Launch
from lcmlora.data import rejection_advice
from lcmlora.data.preparation.shards import (
    Finished,
    InputShard,
    Spare,
    Task,
    digest,
    is_candidate,
    is_record,
    line_of,
    parsed,
)
from lcmlora.data.preparation.working import Results, ShardedSource, opened
from lcmlora.data.reading.candidates import Candidate, Rejection
from lcmlora.data.rejection_advice import ByReason
from lcmlora.data.sources import split_names
from lcmlora.data.unused_files import Tally, UnusedFiles, count, merged, no_names
from lcmlora.io.terminal import note
from lcmlora.progress import track

_SLICE, _LONGEST_SLICE = 1024, 4096  # candidates that are decoded as one task
# Settings that change no line of a shard.
_LATER = {"min_side", "max_aspect", "near_duplicates", "scores", "split", "max_rejected", "validation", "test", "seed"}


@dataclass
class Listed:
    """Counts of what all shards list.

    of_shards: rejections of whole shards, that is of tar files or tables.
    first: the first rejection.
    """

    shards: int = 0
    candidates: int = 0
    rejections: int = 0
    of_shards: int = 0
    first: Rejection | None = None

    def add(self, rejection: Rejection, shard: str) -> None:
        """Counts a rejection of the shard with this name."""
        self.rejections += 1
        self.of_shards += rejection.name == shard
        self.first = self.first or rejection


class PictureSource(ShardedSource, Protocol):
    """What `survey_shards` needs of a source; `EncodedPictures` says what each of these does."""

    @property
    def separate_files(self) -> bool: ...

    @property
    def splits_inside(self) -> bool: ...

    @property
    def left_out(self) -> dict[str, Tally]: ...

    def refused(self) -> Iterable[Rejection]: ...

    def take_spare(self, spare: Spare) -> None: ...

    def split_inside(self, each: Candidate | Rejection) -> tuple[str, str]: ...

    def unit_of(self, candidate: Candidate) -> str: ...

    def check_listed(self, listed: Listed) -> None: ...

    def unused_files(self) -> UnusedFiles: ...


class Rejections:
    """Rejections in files, by their rank. They come back in the order of ranks, and can be iterated over again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, IO[bytes]] = {}
        self.count = 0

    def add(self, rejection: Rejection) -> None:
        if rejection.rank not in self._files:
            self._files[rejection.rank] = (self._folder / f"rejected-{rejection.rank}").open("w+b")
        self._files[rejection.rank].write(line_of(rejection))
        self.count += 1

    def __iter__(self) -> Iterator[Rejection]:
        for _, file in sorted(self._files.items()):
            file.seek(0)
            yield from (_rejection(line) for line in file)
            file.seek(0, 2)


@dataclass
class Found:
    """What a source has.

    records: the lines of the usable pictures, in a stable order; they can be iterated over again.
    left_out: pictures or files of splits that are not wanted, by split.
    of_pictures: whether `left_out` counts pictures; else it counts files with many pictures.
    unused_files: files that the source does not use, by kind.
    """

    records: Iterable[bytes]
    rejections: Rejections
    left_out: dict[str, Tally] = field(default_factory=dict)
    unused_files: dict[str, Tally] = field(default_factory=dict)
    of_pictures: bool = False


def survey_shards(source: PictureSource, finished: Finished, folder: Path, launch: Launch) -> Found:
    """Returns what a source has; reads the shards that are not finished, and keeps their results.

    Args:
        folder: for files of this run.
        launch: where shards are read.

    Raises:
        UserError: as of `Source.survey`.
    """
    with opened(source, launch) as results:
        survey = _Survey(source, finished, folder, results)
        survey.list_shards()
        survey.divide()
        survey.read_pictures()
    return survey.found()


class _Planned(NamedTuple):
    """A shard or a slice of one in the order of the source; `key` is that of its result."""

    key: str
    name: str
    state: str
    pictures: int = 0
    done: bool = False


class _Plan:
    """Shards or slices, in a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb")
        self.count = self.done = self.pictures = self.pictures_done = 0

    def add(self, planned: _Planned) -> None:
        self._file.write(json.dumps(planned).encode() + b"\n")
        self.count += 1
        self.done += planned.done
        self.pictures += planned.pictures
        self.pictures_done += planned.pictures * planned.done

    def __iter__(self) -> Iterator[_Planned]:
        self._file.flush()
        with self._path.open("rb") as file:
            yield from (_Planned(*json.loads(line)) for line in file)


class _Records:
    """The lines of all records."""

    def __init__(self, finished: Finished, slices: _Plan) -> None:
        self._finished, self._slices = finished, slices

    def __iter__(self) -> Iterator[bytes]:
        for planned in self._slices:
            yield from filter(is_record, self._finished.lines(planned.key))


class _Survey:
    """The steps of `survey_shards`."""

    def __init__(self, source: PictureSource, finished: Finished, folder: Path, results: Results) -> None:
        self._source = source
        self._finished = finished
        self._results = results
        self._shards = _Plan(folder / "shards")
        self._slices = _Plan(folder / "slices")
        self._rejections = Rejections(folder)
        self._inside = _SplitsInside(source)
        self._unused_files = dict[str, Tally]()
        self._run = secrets.token_hex(8)  # of the keys of shards whose state nobody knows
        data = source.data
        kind = f"{type(source).__module__}.{type(source).__qualname__}"
        self._listing = [kind, data.model_dump(mode="json", exclude=_LATER), sorted(data.scores)]
        scores = data.model_dump(mode="json", include={"scores"})
        self._decoding = [self._listing, scores, data.near_duplicates is not None]

    def list_shards(self) -> None:
        """Lists the pictures with captions of each shard, and counts them."""
        for shard in self._source.shards():
            key = digest("list", self._listing, shard, shard.state or self._run)
            self._shards.add(_Planned(key, shard.name, shard.state, 0, self._finished.has(key)))

        def tasks() -> Iterator[Task]:
            for planned, shard in zip(self._shards, self._source.shards(), strict=True):
                if not planned.done:
                    yield Task(planned.key, shard)

        finished = self._finish(tasks())
        for _ in track(finished, "read captions", total=self._shards.count, completed=self._shards.done):
            pass
        listed = Listed(self._shards.count)
        for planned in self._shards:
            for line in self._finished.lines(planned.key):
                if is_candidate(line):
                    listed.candidates += 1
                    self._inside.count(line)
                elif isinstance(found := parsed(line), Rejection):
                    listed.add(found, planned.name)
                elif isinstance(found, Spare):
                    self._source.take_spare(found)
        self._source.check_listed(listed)
        self._inside.choose()

    def divide(self) -> None:
        """Divides the candidates into slices, and stops where most pictures have no caption."""
        for planned in self._shards:
            for lines in self._slices_of(planned, self._rejections):
                key = digest("decode", self._decoding, planned.state or self._run, sha256(b"".join(lines)).hexdigest())
                self._slices.add(_Planned(key, planned.name, planned.state, len(lines), self._finished.has(key)))
        for rejection in self._source.refused():
            self._rejections.add(rejection)
        if self._slices.done:
            note(f"{self._slices.done} of {self._slices.count} shards were read before")
        # Before hours are spent on decoding the few that have a caption.
        total = self._slices.pictures + self._rejections.count
        self._unused_files = unused = self._source.unused_files().by_kind()
        rejection_advice.check_captions(self._source.data, ByReason(self._rejections), total, unused)

    def read_pictures(self) -> None:
        """Decodes the pictures of the slices that are not finished."""

        def tasks() -> Iterator[Task]:
            planned_slices = iter(self._slices)
            for planned in self._shards:
                for lines in self._slices_of(planned):
                    if not (each := next(planned_slices)).done:
                        yield Task(each.key, InputShard(each.name, each.state), [*map(_candidate, lines)])

        pictures = (None for task in self._finish(tasks()) for _ in task.candidates or ())
        for _ in track(pictures, "read pictures", total=self._slices.pictures, completed=self._slices.pictures_done):
            pass
        for planned in self._slices:
            for line in self._finished.lines(planned.key):
                if not is_record(line):
                    self._rejections.add(_rejection(line))

    def found(self) -> Found:
        return Found(
            _Records(self._finished, self._slices),
            self._rejections,
            self._inside.left_out(),
            self._unused_files,
            self._source.separate_files,
        )

    def _finish(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """Yields each task when its result is kept."""
        for task, content in self._results(tasks):
            self._finished.write(task.key, content)
            yield task

    def _slices_of(self, planned: _Planned, rejections: Rejections | None = None) -> Iterator[list[bytes]]:
        """Yields the lines of the wanted candidates of a shard, some thousand at a time.

        Args:
            rejections: takes the rejections of the shard.
        """
        lines: list[bytes] = []
        unit = ""
        for line in self._finished.lines(planned.key):
            if not self._inside.wants(line):
                continue
            if not is_candidate(line):
                if rejections is not None and isinstance(found := parsed(line), Rejection):
                    rejections.add(found)
                continue
            if len(lines) >= _SLICE:
                following = self._source.unit_of(_candidate(line))
                if following != unit or len(lines) >= _LONGEST_SLICE:
                    yield lines
                    lines = []
            lines.append(line)
            if len(lines) == _SLICE:
                unit = self._source.unit_of(_candidate(line))
        if lines:
            yield lines


class _SplitsInside:
    """The splits that folders in tar files name, and which of them are used."""

    def __init__(self, source: PictureSource) -> None:
        self._source = source
        self._names: dict[str, Tally] = {}  # of candidates, by split
        self._unwanted: set[str] = set()

    def count(self, line: bytes) -> None:
        """Counts a candidate."""
        if self._source.splits_inside:
            split, name = self._source.split_inside(_candidate(line))
            count(self._names.setdefault(split, no_names()), name)

    def choose(self) -> None:
        """Chooses among the splits when all candidates were counted."""
        if self._names:
            counts = {split: names["count"] for split, names in self._names.items()}
            used = split_names.used_splits(self._source.data.path, counts, self._source.data.split)
            self._unwanted = {*counts} - {*used}

    def wants(self, line: bytes) -> bool:
        """Returns whether a candidate or a rejection is in a split that is used."""
        found = parsed(line) if self._unwanted else None
        return found is None or isinstance(found, Spare) or self._source.split_inside(found)[0] not in self._unwanted

    def left_out(self) -> dict[str, Tally]:
        """Returns what is left out: files of the source, and names in its tar files."""
        found = {split: Tally(**names) for split, names in self._source.left_out.items()}
        for split in sorted(self._unwanted):
            names, inside = found.get(split, no_names()), self._names[split]
            found[split] = merged(names, inside)
        return found


def _candidate(line: bytes) -> Candidate:
    found = parsed(line)
    assert isinstance(found, Candidate)
    return found


def _rejection(line: bytes) -> Rejection:
    found = parsed(line)
    assert isinstance(found, Rejection)
    return found
