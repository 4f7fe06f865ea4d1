"""Source `folder`: pictures with a caption beside each, or with metadata in a table; here or in a bucket."""

from __future__ import annotations

import posixpath
from pathlib import Path, PurePosixPath

from lcmlora.config import Data
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
    Rejection,
    Unusable,
    printable,
    scores_in,
)
from lcmlora.data.reading.captions import CaptionFiles, Description, caption_in, read_captions
from lcmlora.data.reading.file_names import FileNames
from lcmlora.data.reading.picture_folders import BucketFolder, LocalFolder, PictureFolder
from lcmlora.data.reading.tables import Row, read_rows
from lcmlora.data.reading.tar_samples import AUXILIARY, maps_beside
from lcmlora.data.sources import split_names
from lcmlora.data.sources.inputs import count_unused
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.data.unused_files import CAPTION_WITHOUT_PICTURE, SECOND_CAPTION, UnusedFiles, in_words, tally
from lcmlora.errors import UserError
from lcmlora.io.remote import Files

_TABLES = (".jsonl", ".csv", ".parquet")
_METADATA = tuple(f"metadata{ending}" for ending in _TABLES)
_FIELDS = ("file_name", "text", *CAPTIONS)


class Folder(EncodedPictures):
    """A folder with pictures, or the one table of metadata that names them. A place is a path below the folder."""

    separate_files = True

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._path = data.path
        self._wanted = data.split
        self._table: str | None = None  # the metadata's name, if the path is a table
        self._others: dict[str, list[str]] = {}  # pictures of splits that are not wanted
        self._used: set[str] = set()  # names of files that are used or rejected
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

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        listing, scores = self._folder.listing, tuple(self.data.scores)
        refused = {name: reason for name, reason in listing.refused.items() if _is_rejection(name)}
        rejections = [Rejection(printable(name), reason) for name, reason in refused.items()]
        listed = [] if self._table else [name for name in listing.names if _is_picture(name)]
        self._used.update(refused, listed)
        pictures, self._others = split_names.choose(self._path, listed, self._wanted)
        metadata, empty_rows = self._metadata(scores, rejections)
        if self._table:
            pictures, self._others = split_names.choose(self._path, {*metadata, *empty_rows}, self._wanted)
        else:
            named = (name for name in (*metadata, *empty_rows) if self._split(name) not in self._others)
            pictures = sorted({*pictures, *named})
        self.left_out = {split: tally(names) for split, names in self._others.items()}
        if not (pictures or rejections):
            raise UserError(self._no_pictures())
        usable = [name for name in pictures if printable(name) == name]
        rejections += [Rejection(printable(name), NOT_UTF8) for name in pictures if printable(name) != name]
        others = [name for name in usable if name not in metadata]
        descriptions = metadata | self._beside(others, scores, rejections)
        rejections += _without_caption(usable, descriptions, empty_rows, rejections)
        return [
            Candidate(name, descriptions[name].caption, name, descriptions[name].scores)
            for name in usable
            if name in descriptions
        ], rejections

    def read(self, place: str) -> bytes:
        content = self._folder.read(place, MAX_BYTES)
        if not 0 < len(content) <= MAX_BYTES:
            raise Unusable(TOO_LARGE if content else EMPTY)
        return content

    def unused_files(self) -> UnusedFiles:
        """Returns the files of the folder that were not used; none if `data.path` is a table."""
        unused = UnusedFiles()
        if self._table:
            return unused
        listing = self._folder.listing
        files = CaptionFiles([*listing.names, *listing.refused])
        with_picture = {name for picture in self._used if _is_picture(picture) for name in files.possible(picture)}
        texts = {n for n in listing.names if PurePosixPath(n).suffix.lower() in TEXTS and n not in self._used}
        unused.add(sorted(texts - with_picture), CAPTION_WITHOUT_PICTURE)
        unused.add(sorted(texts & with_picture - self._captions_left_out()), SECOND_CAPTION)
        count_unused(unused, listing, self._used | texts)
        return unused

    def _captions_left_out(self) -> set[str]:
        """Returns the caption files of the pictures in splits that are left out."""
        files = CaptionFiles(self._folder.listing.names)
        return {name for pictures in self._others.values() for picture in pictures for name in files.possible(picture)}

    def _split(self, name: str) -> str:
        return split_names.split_of(name) or split_names.TRAIN

    def _no_pictures(self) -> str:
        unused = self.unused_files().by_kind()
        has = f"; there are {in_words(unused)}" if unused else ""
        return f"{self._path}: no pictures (JPEG, PNG or WebP) in this folder or below it{has}"

    def _beside(
        self, pictures: list[str], scores: tuple[str, ...], rejections: list[Rejection]
    ) -> dict[str, Description]:
        """Returns the descriptions in files beside the pictures."""
        listing = self._folder.listing
        caption_files = CaptionFiles([*listing.names, *listing.refused])
        files = {}
        for name in pictures:
            try:
                files[name] = caption_files.of(name)
            except Unusable as reason:
                rejections.append(Rejection(printable(name), str(reason), detail=reason.detail))
        read = read_captions(self._folder, files, scores)
        self._used.update(file for name, names in files.items() if name not in read for file in names)  # empty ones
        descriptions = {}
        for name, found in read.items():
            self._used.update(found.files)
            if isinstance(found.description, Unusable):
                rejections.append(Rejection(printable(name), str(found.description)))
            else:
                descriptions[name] = found.description
        return descriptions

    def _metadata(
        self, scores: tuple[str, ...], rejections: list[Rejection]
    ) -> tuple[dict[str, Description], dict[str, str]]:
        """Returns the descriptions in the tables of metadata, and the rows with an empty text, both by picture."""
        listing = self._folder.listing
        all_tables = [name for name in listing.names if PurePosixPath(name).name.lower() in _METADATA]
        self._used.update(all_tables)
        wanted_tables = [name for name in all_tables if self._split(name) not in self._others]
        names = FileNames(listing.names, self._folder.root)
        descriptions: dict[str, Description] = {}
        empty_rows: dict[str, str] = {}
        tables = [self._table] if self._table else wanted_tables
        for row in read_rows(self._folder.path, tables, wanted=(*_FIELDS, *scores)):
            if isinstance(row, Rejection):
                rejections.append(row)
                continue
            fields = {key.casefold(): value for key, value in row.fields.items()} | row.fields
            name = fields.get("file_name")
            if not isinstance(name, str) or not any(key in fields for key in _FIELDS[1:]):
                rejections.append(_nameless(row))
                continue
            label = f"row {row.number} of {printable(row.table)}"
            try:
                path = self._resolve(name, posixpath.dirname(row.table), names)
                if path in descriptions:
                    raise Unusable(NAMED_TWICE, label)
                caption = caption_in(fields, _FIELDS[1:])
            except Unusable as reason:
                rejections.append(Rejection(printable(name), str(reason), detail=reason.detail))
                continue
            if caption.text:
                descriptions[path] = Description(caption, scores_in(fields, scores))
            else:
                empty_rows[path] = label
        return descriptions, empty_rows

    def _resolve(self, name: str, folder: str, names: FileNames) -> str:
        """Returns the path of the file that a row names. Raises Unusable."""
        try:
            return names.find(name, folder)
        except Unusable as reason:
            path = posixpath.normpath(posixpath.join(folder, name))
            if refused := self._folder.listing.refused.get(path):
                raise Unusable(refused) from None
            if str(reason) != MISSING:
                raise
            try:
                self._folder.check_readable(path)  # a hidden file is not in the listing, but may be named
            except Unusable as unreadable:
                raise (reason if str(unreadable) == MISSING else unreadable) from None
            return path


def _without_caption(
    pictures: list[str],
    descriptions: dict[str, Description],
    empty_rows: dict[str, str],
    rejections: list[Rejection],
) -> list[Rejection]:
    """Returns rejections of the pictures that have no description and are not rejected yet: maps of another picture,
    and pictures without a caption."""
    rejected = {rejection.name for rejection in rejections}
    bare = [name for name in pictures if name not in descriptions and printable(name) not in rejected]
    maps = maps_beside((name for name in bare if name not in empty_rows), pictures)
    return [
        *(Rejection(name, AUXILIARY) for name in bare if name in maps),
        *(Rejection(name, NO_CAPTION, detail=empty_rows.get(name, "")) for name in bare if name not in maps),
    ]


def _nameless(row: Row) -> Rejection:
    keys = ", ".join(printable(key) for key in row.fields)[:200]
    return Rejection(row.name, NO_NAME, detail=f"of these it has {keys or 'none'}")


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _is_rejection(name: str) -> bool:
    """Returns whether a file that must not be read is a rejection: a folder, a picture or metadata."""
    return name.endswith("/") or _is_picture(name) or PurePosixPath(name).name.lower() in _METADATA
