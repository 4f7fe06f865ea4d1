"""Source `folder`: pictures with a caption beside each, or with metadata in a table; here or in a bucket."""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lcmlora.config import Data
from lcmlora.data.preparation.folder_index import FolderIndex
from lcmlora.data.preparation.shards import InputShard, Listing, Spare
from lcmlora.data.reading.candidates import (
    CAPTIONS,
    EMPTY,
    MAX_BYTES,
    MISSING,
    NAMED_TWICE,
    NO_CAPTION,
    NO_NAME,
    NOT_UTF8,
    SUFFIXES,
    TEXTS,
    TOO_LARGE,
    Candidate,
    Caption,
    Rejection,
    Unusable,
    printable,
    scores_in,
)
from lcmlora.data.reading.captions import CaptionFile, Description, caption_in, read_captions
from lcmlora.data.reading.file_names import base_name, ending, stem
from lcmlora.data.reading.folder_listing import Entry
from lcmlora.data.reading.picture_folders import BucketFolder, LocalFolder, PictureFolder
from lcmlora.data.reading.tables import Row, read_rows
from lcmlora.data.reading.tar_samples import AUXILIARY, picture_of_map
from lcmlora.data.sources import split_names
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.data.unused_files import (
    CAPTION_WITHOUT_PICTURE,
    HIDDEN_FILE,
    REPEATED_FOLDER,
    SECOND_CAPTION,
    Tally,
    UnusedFiles,
    count,
    in_words,
    no_names,
)
from lcmlora.errors import UserError
from lcmlora.io.isolation import Processes
from lcmlora.io.remote import Files

_TABLES = (".jsonl", ".csv", ".parquet")
_METADATA = tuple(f"metadata{ending}" for ending in _TABLES)
_FIELDS = ("file_name", "text", *CAPTIONS)
_END = bytes([0, 64, 0, 0])  # a shard ends at a name whose digest is below it: at one in 1,024
_LONGEST = 4096  # pictures of a shard
_REFUSED, _ROW, _BAD_NAME, _AMBIGUOUS, _FIRST_TURN, _MAP, _BARE = 0, 1, 2, 3, 4, 98, 99  # ranks of rejections
_NEAR, _NEAR_LEFT_OUT = 1, 2  # marks of caption files that may be of a picture, or of one in a split left out


class Folder(EncodedPictures):
    """A folder with pictures, or the one table of metadata that names them. A place is a path below the folder.

    A shard is a slice of the sorted pictures. Where it ends is decided by a picture's name, so that a new picture
    changes its own slice alone.
    """

    separate_files = True

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._path = data.path
        self._table: str | None = None  # the metadata's name, if the path is a table
        self._unwanted: set[str] = set()  # splits
        self._index: FolderIndex | None = None
        if "://" in self._path:
            path = self._path
            if path.lower().endswith(_TABLES):
                path, _, self._table = path.rpartition("/")
            self._folder: PictureFolder = BucketFolder(Files(path))
            return
        local = Path(self._path)
        if local.suffix.lower() in _TABLES and local.is_file():
            local, self._table = local.parent, local.name
        elif not local.is_dir():
            raise UserError(
                f"data.path: {data.path} is not a folder; source folder needs one with pictures and captions"
            )
        self._folder = LocalFolder(local, data.links)

    def shards(self) -> Iterator[InputShard]:
        if self._index is None:
            self._index = self._read()
        yield from self._index.shards()

    def listed(self, shard: InputShard, processes: Processes) -> Iterator[Listing]:
        del processes  # captions are small and plain text
        pictures = [_Picture(*each) for each in shard.content]
        files = {p.name: [CaptionFile(*file) for file in p.files] for p in pictures if p.description is None}
        read = read_captions(self._folder, files, tuple(self.data.scores))
        # What two pictures share was offered to both of them, and is taken back from both.
        if spare := [file.name for name in read for file in files[name] if file.name not in read[name].files]:
            yield Spare(spare)
        for picture in pictures:
            found = read[picture.name].description if picture.name in read else None
            if picture.description is not None:
                text, raw, scores = picture.description
                yield Candidate(picture.name, Caption(text, raw), picture.name, scores)
            elif isinstance(found, Description):
                yield Candidate(picture.name, found.caption, picture.name, found.scores)
            elif isinstance(found, Unusable):
                rank = _FIRST_TURN + read[picture.name].turn
                yield Rejection(printable(picture.name), str(found), rank=rank)
            elif picture.is_map:
                yield Rejection(picture.name, AUXILIARY, rank=_MAP)
            elif not picture.is_told:
                yield Rejection(picture.name, NO_CAPTION, detail=picture.empty_row, rank=_BARE)

    def take_spare(self, spare: Spare) -> None:
        assert self._index is not None
        for name in spare.names:
            self._index.take_back(name)

    def refused(self) -> Iterator[Rejection]:
        assert self._index is not None
        return self._index.rejections()

    def unit_of(self, candidate: Candidate) -> str:
        return ""  # a shard is no longer than what is decoded as a whole

    def read(self, place: str) -> bytes:
        content = self._folder.read(place, MAX_BYTES)
        if not 0 < len(content) <= MAX_BYTES:
            raise Unusable(TOO_LARGE if content else EMPTY)
        return content

    def unused_files(self) -> UnusedFiles:
        """Returns the files of the folder that were not used; none if `data.path` is a table."""
        assert self._index is not None
        return UnusedFiles() if self._table else self._count_unused(self._index)

    def _count_unused(self, index: FolderIndex) -> UnusedFiles:
        unused = UnusedFiles()
        if any(True for _ in index.unused_texts()):
            for name in filter(_is_picture, itertools.chain(index.names(), (n for n, _ in index.others("refused")))):
                index.mark_near(name, _NEAR)
            for name in filter(_is_picture, index.names()):
                if self._split(name) in self._unwanted:
                    index.mark_near(name, _NEAR_LEFT_OUT, readable=True)
        unused.add((name for name, near in index.unused_texts() if not near & _NEAR), CAPTION_WITHOUT_PICTURE)
        unused.add((name for name, near in index.unused_texts() if near == _NEAR), SECOND_CAPTION)
        unused.add(name for name in index.names() if not self._is_counted(name, index))
        refused = (name for name, _ in index.others("refused") if not (_is_rejection(name) or index.is_used(name)))
        unused.add(refused)
        unused.add((name for name, _ in index.others("hidden")), HIDDEN_FILE)
        unused.add((name for name, _ in index.others("repeated")), REPEATED_FOLDER)
        return unused

    def _is_counted(self, name: str, index: FolderIndex) -> bool:
        """Returns whether a file is used, or is among the unused texts."""
        if _is_picture(name) or ending(name).lower() in TEXTS:
            return True
        return base_name(name).lower() in _METADATA or index.is_used(name)

    def _split(self, name: str) -> str:
        return split_names.split_of(name) or split_names.TRAIN

    def _read(self) -> FolderIndex:
        """Lists the folder, reads its metadata, and divides its pictures into shards.

        Raises:
            UserError: there are no pictures.
        """
        index = FolderIndex(self._folder)
        has_rejections = False
        for name, reason in index.others("refused"):
            if _is_rejection(name):
                index.tell(Rejection(printable(name), reason, rank=_REFUSED))
                has_rejections = True
        if not self._table:
            self._choose_splits(filter(_is_picture, index.names()))
            for name in filter(_is_picture, index.names()):
                index.add_picture(name)
        for rejection in self._read_metadata(index):
            index.tell(rejection)
            has_rejections = True
        if self._table:
            self._choose_splits(picture.name for picture in index.pictures())
        pictures = (p for p in index.pictures() if self._split(p.name) not in self._unwanted)
        if next(pictures, None) is None and not has_rejections:
            unused = UnusedFiles() if self._table else self._count_unused(index)
            has = f"; there are {in_words(unused.by_kind())}" if unused.by_kind() else ""
            raise UserError(f"{self._path}: no pictures (JPEG, PNG or WebP) in this folder or below it{has}")
        self._divide(index)
        return index

    def _choose_splits(self, names: Iterable[str]) -> None:
        tallies: dict[str, Tally] = {}
        for name in names:
            count(tallies.setdefault(self._split(name), no_names()), name)
        counts = {split: names["count"] for split, names in tallies.items()}
        self._unwanted = {*counts} - {*split_names.used_splits(self._path, counts, self.data.split)}
        self.left_out = {split: tallies[split] for split in sorted(self._unwanted)}

    def _read_metadata(self, index: FolderIndex) -> Iterator[Rejection]:
        """Puts the descriptions in the tables of metadata into the index; yields the rows that cannot be used."""
        scores = tuple(self.data.scores)
        found = (name for name in index.names() if base_name(name).lower() in _METADATA)
        tables = [self._table] if self._table else [n for n in found if self._split(n) not in self._unwanted]
        for row in read_rows(self._folder.path, tables, wanted=(*_FIELDS, *scores)):
            if isinstance(row, Rejection):
                yield replace(row, rank=_ROW)
                continue
            fields = {key.casefold(): value for key, value in row.fields.items()} | row.fields
            name = fields.get("file_name")
            if not isinstance(name, str) or not any(key in fields for key in _FIELDS[1:]):
                yield _nameless(row)
                continue
            label = f"row {row.number} of {printable(row.table)}"
            try:
                path = self._resolve(name, posixpath.dirname(row.table), index)
                if index.is_described(path):
                    raise Unusable(NAMED_TWICE, label)
                caption = caption_in(fields, _FIELDS[1:])
            except Unusable as reason:
                yield Rejection(printable(name), str(reason), detail=reason.detail, rank=_ROW)
                continue
            if caption.text:
                index.describe(path, Description(caption, scores_in(fields, scores)))
            else:
                index.add_empty_row(path, label)

    def _resolve(self, name: str, folder: str, index: FolderIndex) -> str:
        """Returns the path of the file that a row names. Raises Unusable."""
        try:
            return index.find(name, folder)
        except Unusable as reason:
            path = posixpath.normpath(posixpath.join(folder, name))
            if refused := index.refusal(path):
                raise Unusable(refused) from None
            if str(reason) != MISSING:
                raise
            try:
                self._folder.check_readable(path)  # a hidden file is not in the listing, but may be named
            except Unusable as unreadable:
                raise (reason if str(unreadable) == MISSING else unreadable) from None
            return path

    def _divide(self, index: FolderIndex) -> None:
        """Adds the shards to the index, and rejects pictures whose names or whose captions' names cannot be used."""
        pictures: list[_Picture] = []
        state = sha256()
        for name, description, empty_row in index.pictures():
            if self._split(name) in self._unwanted:
                continue
            if printable(name) != name:
                index.reject(Rejection(printable(name), NOT_UTF8, rank=_BAD_NAME))
                continue
            files: list[CaptionFile] = []
            found = index.state(name)
            if found is None:  # a hidden file
                found = self._folder.state(Entry("names", name))[0]
            state.update(f"{name}\0{found}\0".encode())
            if description is None:
                try:
                    for file, file_state in index.caption_files(name):
                        files.append(file)
                        state.update(f"{printable(file.name)}\0{file_state}\0".encode())
                except Unusable as reason:
                    index.reject(Rejection(name, str(reason), detail=reason.detail, rank=_AMBIGUOUS))
                    continue
            is_map = description is None and not empty_row and self._is_map(name, index)
            is_told = description is None and index.is_told(name)
            pictures.append(_Picture(name, description, files, empty_row, is_map and not is_told, is_told))
            if sha256(name.encode()).digest()[:4] < _END or len(pictures) == _LONGEST:
                index.add_shard(InputShard(pictures[0].name, state.hexdigest(), pictures))
                pictures, state = [], sha256()
        if pictures:
            index.add_shard(InputShard(pictures[0].name, state.hexdigest(), pictures))

    def _is_map(self, name: str, index: FolderIndex) -> bool:
        """Returns whether a picture without a caption is by its name a map of another one."""
        other = picture_of_map(name)
        if other is None:
            return False
        beside = (each for each in index.pictures_with_stem(other) if stem(each) == other)
        return any(printable(each) == each and self._split(each) not in self._unwanted for each in beside)


class _Picture(NamedTuple):
    """A picture of a shard.

    description: from metadata: caption, raw caption, scores; None if it is in one of the files.
    is_map: whether it is the map of another picture if it has no caption.
    is_told: whether another rejection has its name.
    """

    name: str
    description: list[Any] | None
    files: list[CaptionFile]
    empty_row: str
    is_map: bool
    is_told: bool


def _nameless(row: Row) -> Rejection:
    keys = ", ".join(printable(key) for key in row.fields)[:200]
    return Rejection(row.name, NO_NAME, detail=f"of these it has {keys or 'none'}", rank=_ROW)


def _is_picture(name: str) -> bool:
    return ending(name).lower() in SUFFIXES


def _is_rejection(name: str) -> bool:
    """Returns whether a file that must not be read is a rejection: a folder, a picture or metadata."""
    return name.endswith("/") or _is_picture(name) or base_name(name).lower() in _METADATA
