"""The files of a folder with any number of pictures, in a database on disk that is deleted with the program.

Names are kept as bytes that sort as Python's texts do, also where a name is not UTF-8.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from lcmlora.data.preparation.shards import InputShard, line_of, parsed
from lcmlora.data.reading.candidates import AMBIGUOUS, Rejection, Unusable
from lcmlora.data.reading.captions import CaptionFile, Description, is_caption_file, order, stems_of
from lcmlora.data.reading.file_names import MAX_COMPARED, FileNames, closest, normal_form, stem_form
from lcmlora.data.reading.picture_folders import PictureFolder

_TABLES = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA temp_store = FILE;
    PRAGMA cache_size = -8192;
    CREATE TABLE files (name BLOB, state TEXT);
    CREATE TABLE others (kind TEXT, folder INTEGER, name BLOB, reason TEXT);
    CREATE TABLE captions (stem BLOB, form BLOB, ending INTEGER, capital INTEGER, name BLOB, state TEXT, size INTEGER,
        refusal TEXT, offers INTEGER DEFAULT 0, near INTEGER DEFAULT 0);
    CREATE TABLE pictures (name BLOB PRIMARY KEY, description TEXT, empty_row TEXT) WITHOUT ROWID;
    CREATE TABLE rejected (name BLOB PRIMARY KEY) WITHOUT ROWID;
"""
_INDICES = """
    CREATE INDEX files_by_name ON files (name);
    CREATE INDEX others_by_name ON others (kind, name);
    CREATE INDEX captions_by_stem ON captions (stem, ending, capital, name);
    CREATE INDEX captions_by_form ON captions (form, stem);
    CREATE INDEX captions_by_name ON captions (name);
"""


class IndexedPicture(NamedTuple):
    """A picture that was listed, or that metadata name.

    description: from metadata: caption, raw caption and scores.
    empty_row: the row of metadata that names it without a text.
    """

    name: str
    description: list[Any] | None
    empty_row: str


class FolderIndex(FileNames):
    """The files of a folder, their names, and the pictures among them."""

    def __init__(self, folder: PictureFolder) -> None:
        """Lists the folder."""
        super().__init__((), folder.root)
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")
        self._has_forms = self._has_stems = False
        self._rejections = tempfile.TemporaryFile()  # noqa: SIM115 - ends with the index
        self._shards = tempfile.TemporaryFile()  # noqa: SIM115
        for entry in folder.entries():
            state, size = folder.state(entry) if entry.kind == "names" else ("", 0)
            if entry.kind == "names":
                self._run("INSERT INTO files VALUES (?, ?)", _bytes(entry.name), state)
            else:
                other = (entry.kind, entry.folder, _bytes(entry.name), entry.reason)
                self._run("INSERT INTO others VALUES (?, ?, ?, ?)", *other)
            if entry.kind in ("names", "refused") and is_caption_file(entry.name):
                stem = stems_of(entry.name)[0]
                row = (_bytes(stem), _bytes(normal_form(stem)), *order(entry.name), _bytes(entry.name), state, size)
                self._run("INSERT INTO captions VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, 0)", *row, entry.reason)
        self._database.executescript(_INDICES)
        self._database.execute("BEGIN")  # never ends, so that no change is written before it must be

    # --- files

    def names(self) -> Iterator[str]:
        """Yields the files that may be read, sorted."""
        return (_text(name) for (name,) in self._run("SELECT name FROM files ORDER BY name"))

    def others(self, kind: str) -> Iterator[tuple[str, str]]:
        """Yields the names of a kind that is not read, and why, in the order in which they are listed."""
        rows = self._run("SELECT name, reason FROM others WHERE kind = ? ORDER BY folder, name", kind)
        return ((_text(name), reason) for name, reason in rows)

    def refusal(self, name: str) -> str:
        """Returns why this file must not be read; empty if it may, or is none."""
        query = "SELECT reason FROM others WHERE kind = 'refused' AND name = ?"
        return next((reason for (reason,) in self._run(query, _bytes(name))), "")

    def state(self, name: str) -> str | None:
        """Returns a text that changes with the file; None if it was not listed."""
        query = "SELECT state FROM files WHERE name = ?"
        return next((state for (state,) in self._run(query, _bytes(name))), None)

    def has(self, path: str) -> bool:
        return self.state(path) is not None

    def of_form(self, form: str) -> list[str]:
        if not self._has_forms:
            self._run("CREATE TABLE forms (form BLOB, name BLOB)")
            for name in self.names():
                self._run("INSERT INTO forms VALUES (?, ?)", _bytes(normal_form(name)), _bytes(name))
            self._run("CREATE INDEX forms_by_form ON forms (form, name)")
            self._has_forms = True
        return [
            _text(name) for (name,) in self._run("SELECT name FROM forms WHERE form = ? ORDER BY name", _bytes(form))
        ]

    def nearest(self, stem: str) -> str | None:
        if not self._has_stems:
            self._run("CREATE TABLE stems (stem BLOB, initial BLOB, length INTEGER, name BLOB)")
            for name in self.names():
                each = stem_form(name)
                row = (_bytes(each), _bytes(each[:1]), len(each), _bytes(name))
                self._run("INSERT INTO stems VALUES (?, ?, ?, ?)", *row)
            self._run("CREATE INDEX stems_by_stem ON stems (stem, name)")
            self._run("CREATE INDEX stems_by_initial ON stems (initial, length)")
            self._has_stems = True
        first = "SELECT MIN(name) FROM stems WHERE stem = ?"
        for (name,) in self._run(first, _bytes(stem)):
            if name is not None:
                return _text(name)
        similar = "SELECT stem FROM stems WHERE initial = ? AND length BETWEEN ? AND ? GROUP BY stem ORDER BY MIN(name)"
        rows = self._run(f"{similar} LIMIT ?", _bytes(stem[:1]), len(stem) - 3, len(stem) + 3, MAX_COMPARED)
        found = closest(stem, [_text(each) for (each,) in rows])
        return None if found is None else _text(next(self._run(first, _bytes(found)))[0])

    # --- captions beside pictures

    def caption_files(self, picture: str) -> list[tuple[CaptionFile, str]]:
        """Returns the caption files of a picture, the one that counts first, each with its state; they are offered to
        this picture.

        Raises:
            Unusable: it could be several.
        """
        files: dict[CaptionFile, str] = {}
        for stem in stems_of(picture):
            matches = self._caption_stems(stem)
            if len(matches) > 1:
                possible = " or ".join(self._captions_of(match)[0][0].name for match in matches[:3])
                raise Unusable(AMBIGUOUS, f"its caption could be {possible}")
            files |= dict(found for match in matches for found in self._captions_of(match))
        for file in files:
            self._run("UPDATE captions SET offers = offers + 1 WHERE name = ?", _bytes(file.name))
        return [*files.items()]

    def take_back(self, caption_file: str) -> None:
        """Takes an offer of a caption file back, since the picture did not need it."""
        self._run("UPDATE captions SET offers = offers - 1 WHERE name = ?", _bytes(caption_file))

    def is_used(self, caption_file: str) -> bool:
        query = "SELECT 1 FROM captions WHERE name = ? AND offers > 0"
        return any(True for _ in self._run(query, _bytes(caption_file)))

    def unused_texts(self) -> Iterator[tuple[str, int]]:
        """Yields the unused caption files but for .json, sorted, each with the marks that it has."""
        query = "SELECT name, near FROM captions WHERE offers = 0 AND refusal = '' AND ending < 3 ORDER BY name"
        return ((_text(name), near) for name, near in self._run(query))

    def mark_near(self, picture: str, mark: int, *, readable: bool = False) -> None:
        """Marks the files that may have a picture's caption, also if they are ambiguous.

        Args:
            readable: only those that may be read.
        """
        for stem in stems_of(picture):
            for match in self._caption_stems(stem, readable=readable):
                only = "AND refusal = ''" if readable else ""
                self._run(f"UPDATE captions SET near = near | ? WHERE stem = ? {only}", mark, _bytes(match))

    def _caption_stems(self, stem: str, *, readable: bool = False) -> list[str]:
        """Returns this stem if a caption file has it; else those that caption files have and that mean the same."""
        only = "AND refusal = ''" if readable else ""
        if any(True for _ in self._run(f"SELECT 1 FROM captions WHERE stem = ? {only} LIMIT 1", _bytes(stem))):
            return [stem]
        query = f"SELECT DISTINCT stem FROM captions WHERE form = ? {only} ORDER BY stem"
        return [_text(each) for (each,) in self._run(query, _bytes(normal_form(stem)))]

    def _captions_of(self, stem: str) -> list[tuple[CaptionFile, str]]:
        query = "SELECT name, size, refusal, state FROM captions WHERE stem = ? ORDER BY ending, capital, name"
        rows = self._run(query, _bytes(stem))
        return [(CaptionFile(_text(name), size, refusal), state) for name, size, refusal, state in rows]

    # --- pictures

    def add_picture(self, name: str) -> None:
        self._run("INSERT OR IGNORE INTO pictures VALUES (?, NULL, '')", _bytes(name))

    def describe(self, name: str, description: Description) -> None:
        """Adds a picture with its description from metadata."""
        self.add_picture(name)
        plain = json.dumps([*description.caption, description.scores])
        self._run("UPDATE pictures SET description = ? WHERE name = ?", plain, _bytes(name))

    def is_described(self, name: str) -> bool:
        query = "SELECT 1 FROM pictures WHERE name = ? AND description IS NOT NULL"
        return any(True for _ in self._run(query, _bytes(name)))

    def add_empty_row(self, name: str, label: str) -> None:
        """Adds a picture that metadata name without a text."""
        self.add_picture(name)
        self._run("UPDATE pictures SET empty_row = ? WHERE name = ?", label, _bytes(name))

    def pictures(self) -> Iterator[IndexedPicture]:
        """Yields the pictures that were added, sorted."""
        for name, description, empty_row in self._run("SELECT * FROM pictures ORDER BY name"):
            yield IndexedPicture(_text(name), json.loads(description) if description else None, empty_row)

    def pictures_with_stem(self, stem: str) -> Iterator[str]:
        """Yields the pictures whose names are this text, or begin with it and a dot."""
        query = "SELECT name FROM pictures WHERE name = ? OR (name > ? AND name < ?)"
        bounds = (_bytes(stem), _bytes(f"{stem}."), _bytes(f"{stem}/"))  # "/" follows "."
        return (_text(name) for (name,) in self._run(query, *bounds))

    # --- rejections and shards

    def reject(self, rejection: Rejection) -> None:
        self._rejections.write(line_of(rejection))

    def tell(self, rejection: Rejection) -> None:
        """Rejects a file or a row, so that a picture of this name is not rejected again for its missing caption."""
        self.reject(rejection)
        self._run("INSERT OR IGNORE INTO rejected VALUES (?)", _bytes(rejection.name))

    def is_told(self, name: str) -> bool:
        return any(True for _ in self._run("SELECT 1 FROM rejected WHERE name = ?", _bytes(name)))

    def rejections(self) -> Iterator[Rejection]:
        self._rejections.seek(0)
        found = map(parsed, self._rejections)
        yield from (each for each in found if isinstance(each, Rejection))
        self._rejections.seek(0, 2)

    def add_shard(self, shard: InputShard) -> None:
        self._shards.write(json.dumps(shard).encode() + b"\n")

    def shards(self) -> Iterator[InputShard]:
        self._shards.flush()
        position = 0
        while True:
            self._shards.seek(position)
            if not (line := self._shards.readline()):
                return
            position = self._shards.tell()
            yield InputShard(*json.loads(line))

    def _run(self, query: str, *values: Any) -> Iterator[Any]:
        return self._database.execute(query, values)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
