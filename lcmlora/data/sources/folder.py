"""Source `folder`: pictures with a caption beside each, or with metadata in a table; here or in a bucket."""

from __future__ import annotations

import posixpath
from pathlib import Path, PurePosixPath

from lcmlora.config import Data
from lcmlora.data.reading import captions
from lcmlora.data.reading.candidates import (
    CAPTIONS,
    EMPTY,
    MAX_BYTES,
    MISSING,
    NO_CAPTION,
    NO_NAME,
    NOT_UTF8,
    SUFFIXES,
    TEXTS,
    TOO_LARGE,
    TWICE,
    Candidate,
    Rejection,
    Unusable,
    printable,
    scores_in,
)
from lcmlora.data.reading.captions import Beside, Told
from lcmlora.data.reading.file_names import Names
from lcmlora.data.reading.picture_folders import Bucket, Here, Place
from lcmlora.data.reading.tables import read_rows
from lcmlora.data.reading.tar_samples import AUXILIARY, maps_beside
from lcmlora.data.sources import splits
from lcmlora.data.sources.inputs import count_unread
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.data.unused_files import CAPTION_WITHOUT_PICTURE, SECOND_CAPTION, UnusedFiles, in_words
from lcmlora.errors import UserError
from lcmlora.io.remote import Files

_TABLES = (".jsonl", ".csv", ".parquet")
_METADATA = tuple(f"metadata{ending}" for ending in _TABLES)
_FIELDS = ("file_name", "text", *CAPTIONS)


class Folder(EncodedPictures):
    """A folder with pictures, or the one file of metadata that names them. A place is a path below the folder."""

    separate_files = True

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._path = data.path
        self._wanted = data.split
        self._table: str | None = None  # of metadata, where the path is one
        self._read: set[str] = set()  # names of which something was made, or that are told otherwise
        if "://" in self._path:
            folder = self._path
            if folder.lower().endswith(_TABLES):
                folder, _, self._table = folder.rpartition("/")
            self._place: Place = Bucket(Files(folder))
            return
        here = Path(self._path)
        if here.suffix.lower() in _TABLES and here.is_file():
            here, self._table = here.parent, here.name
        elif not here.is_dir():
            raise UserError(
                f"data.path: {data.path} is not a folder; source folder needs one with pictures and captions"
            )
        self._place = Here(here, data.links)

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        tree, scores = self._place.tree, tuple(self.data.scores)
        rejections = [Rejection(printable(name), reason) for name, reason in tree.refused.items() if _told_of(name)]
        self._read.update(name for name in tree.refused if _told_of(name))
        walked = [] if self._table else [name for name in tree.names if _is_picture(name)]
        self._read.update(walked)
        pictures, self.left_out = splits.choose(self._path, walked, self._wanted)
        told, bare_rows = self._metadata(scores, rejections)
        if self._table:
            kept, self.left_out = splits.choose(self._path, {*told, *bare_rows}, self._wanted)
            pictures = kept
        else:
            pictures = sorted({*pictures, *(n for n in (*told, *bare_rows) if self._split(n) not in self.left_out)})
        if not (pictures or rejections):
            raise UserError(self._nothing())
        usable = []
        for name in pictures:
            if printable(name) == name:
                usable.append(name)
            else:
                rejections.append(Rejection(printable(name), NOT_UTF8))
        told |= self._beside([name for name in usable if name not in told], scores, rejections)
        refused = {rejection.name for rejection in rejections}
        bare = [name for name in usable if name not in told and printable(name) not in refused]
        maps = maps_beside((name for name in bare if name not in bare_rows), usable)
        rejections += [Rejection(name, AUXILIARY) for name in bare if name in maps]
        rejections += [Rejection(name, NO_CAPTION, detail=bare_rows.get(name, "")) for name in bare if name not in maps]
        return [Candidate(name, told[name][0], name, told[name][1]) for name in usable if name in told], rejections

    def read(self, place: str) -> bytes:
        content = self._place.read(place, MAX_BYTES)
        if not 0 < len(content) <= MAX_BYTES:
            raise Unusable(TOO_LARGE if content else EMPTY)
        return content

    def unused_files(self) -> UnusedFiles:
        """Returns the files of the folder that were not used; none if `data.path` is a table."""
        found = UnusedFiles()
        if self._table:
            return found
        tree = self._place.tree
        with_pictures = Beside([*tree.names, *tree.refused])
        beside = {name for picture in self._read if _is_picture(picture) for name in with_pictures.all_of(picture)}
        texts = {n for n in tree.names if PurePosixPath(n).suffix.lower() in TEXTS and n not in self._read}
        found.add(sorted(texts - beside), CAPTION_WITHOUT_PICTURE)
        found.add(sorted(texts & beside - self._unread_texts()), SECOND_CAPTION)
        count_unread(found, tree, self._read | texts)
        return found

    def _unread_texts(self) -> set[str]:
        """Returns the files of captions whose pictures belong to a split that is left out."""
        beside = Beside(self._place.tree.names)
        return {name for left in self.left_out.values() for picture in left for name in beside.all_of(picture)}

    def _split(self, name: str) -> str:
        return splits.of(name) or splits.TRAIN

    def _nothing(self) -> str:
        there = self.unused_files().by_kind()
        has = f"; there are {in_words(there)}" if there else ""
        return f"{self._path}: no pictures (JPEG, PNG or WebP) in this folder or below it{has}"

    def _beside(self, pictures: list[str], scores: tuple[str, ...], rejections: list[Rejection]) -> dict[str, Told]:
        """Returns the captions that stand in a file beside their picture."""
        tree = self._place.tree
        beside = Beside([*tree.names, *tree.refused])
        files = {}
        for name in pictures:
            try:
                files[name] = beside.of(name)
            except Unusable as reason:
                rejections.append(Rejection(printable(name), str(reason), detail=reason.detail))
        told = {}
        said = captions.read(self._place, files, scores)
        self._read.update(file for name, found in files.items() if name not in said for file in found)  # empty ones
        for name, found in said.items():
            self._read.update(found.files)
            if isinstance(found.told, Unusable):
                rejections.append(Rejection(printable(name), str(found.told)))
            else:
                told[name] = found.told
        return told

    def _metadata(self, scores: tuple[str, ...], rejections: list[Rejection]) -> tuple[dict[str, Told], dict[str, str]]:
        """Returns what the metadata say of every picture that they name, and rows whose text is empty, by picture."""
        tree = self._place.tree
        tables = (
            [self._table]
            if self._table
            else [
                name
                for name in tree.names
                if PurePosixPath(name).name.lower() in _METADATA and self._split(name) not in self.left_out
            ]
        )
        self._read.update(name for name in tree.names if PurePosixPath(name).name.lower() in _METADATA)
        names = Names(tree.names, self._place.root)
        told: dict[str, Told] = {}
        empty: dict[str, str] = {}
        for row in read_rows(self._place.path, tables, wanted=(*_FIELDS, *scores)):
            if isinstance(row, Rejection):
                rejections.append(row)
                continue
            fields = {key.casefold(): value for key, value in row.fields.items()} | row.fields
            name = fields.get("file_name")
            where = f"row {row.number} of {printable(row.table)}"
            if not isinstance(name, str) or not any(key in fields for key in _FIELDS[1:]):
                shown = ", ".join(printable(key) for key in row.fields)[:200]
                rejections.append(Rejection(row.name, NO_NAME, detail=f"of these it has {shown or 'none'}"))
                continue
            try:
                path = self._resolve(name, posixpath.dirname(row.table), names)
                if path in told:
                    raise Unusable(TWICE, where)
                caption = captions.caption_in(fields, _FIELDS[1:])
            except Unusable as reason:
                rejections.append(Rejection(printable(name), str(reason), detail=reason.detail))
                continue
            if caption.text:
                told[path] = (caption, scores_in(fields, scores))
            else:
                empty[path] = where
        return told, empty

    def _resolve(self, name: str, folder: str, names: Names) -> str:
        """Returns the path of the file that a row names. Raises Unusable."""
        try:
            return names.find(name, folder)
        except Unusable as reason:
            path = posixpath.normpath(posixpath.join(folder, name))
            if refused := self._place.tree.refused.get(path):
                raise Unusable(refused) from None
            if str(reason) != MISSING:
                raise
            try:
                self._place.check(path)  # one that is not looked for, since it is hidden, may be named
            except Unusable as other:
                raise (reason if str(other) == MISSING else other) from None
            return path


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _told_of(name: str) -> bool:
    """Whether a name that cannot be read is a rejection of its own: a folder, a picture, metadata."""
    return name.endswith("/") or _is_picture(name) or PurePosixPath(name).name.lower() in _METADATA
