"""Files below `data.path` that the source does not use, counted by kind, so that the report has every file.

report.json names them `passed_over`: programs read this key, so it stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypedDict

from lcmlora.data.reading.candidates import printable
from lcmlora.data.reading.file_names import ending, stem

_MAX_NAMES = 10  # names that a tally lists
_MAX_KINDS = 100  # a data set may have an ending of its own for every file
_ENDING = re.compile(r"(?:\.tar)?\.[a-z0-9_~-]{1,12}")

# The kinds that are no ending.
HIDDEN_FILE = "hidden (a name that begins with a dot)"
REPEATED_FOLDER = "links to folders that are read under another name"
CAPTION_WITHOUT_PICTURE = "captions without a picture"
SECOND_CAPTION = "captions of pictures that have another"
NO_ENDING = "without an ending"
OTHER_ENDINGS = "other endings"

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
TABLES = (".jsonl", ".csv", ".parquet", ".json", ".tsv", ".xlsx", ".txt", ".arrow")


class Tally(TypedDict):
    """How many names there are, and the first ten of them."""

    count: int
    first: list[str]


def tally(names: Sequence[str]) -> Tally:
    return {"count": len(names), "first": [printable(name) for name in names[:_MAX_NAMES]]}


def count(tallied: Tally, name: str) -> None:
    """Adds a name to a tally."""
    tallied["count"] += 1
    if len(tallied["first"]) < _MAX_NAMES:
        tallied["first"].append(printable(name))


def no_names() -> Tally:
    return {"count": 0, "first": []}


def merged(tallied: Tally, following: Tally) -> Tally:
    first = [*tallied["first"], *following["first"]][:_MAX_NAMES]
    return {"count": tallied["count"] + following["count"], "first": first}


class UnusedFiles:
    """Counts names by kind, and keeps the first few names of each kind."""

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}

    def add(self, names: Iterable[str], kind: str | None = None) -> None:
        """Counts these names under a kind; by default each under its own ending."""
        for name in names:
            key = kind or _ending(name)
            if key not in self._tallies and len(self._tallies) >= _MAX_KINDS:
                key = OTHER_ENDINGS
            count(self._tallies.setdefault(key, no_names()), name)

    def by_kind(self) -> dict[str, Tally]:
        """Returns the tally of each kind, the most frequent kind first."""
        return dict(sorted(self._tallies.items(), key=lambda item: (-item[1]["count"], item[0])))


def archives_and_tables(unused: dict[str, Tally]) -> tuple[list[str], list[str]]:
    """Returns the first name of each kind that may be packed pictures, and of each that may be a table of captions."""
    first = [names["first"][0] for names in unused.values() if names["first"]]
    kinds = {name: ending(name).lower() for name in first}
    return [n for n in first if kinds[n] in ARCHIVES], [n for n in first if kinds[n] in TABLES]


def in_words(unused: dict[str, Tally], most: int = 5) -> str:
    """Returns the counts of the first kinds in a few words: 12 .jxl, 3 .zip."""
    counts = [f"{names['count']} {kind}" for kind, names in list(unused.items())[:most]]
    return ", ".join(counts) + (", ..." if len(unused) > most else "")


def _ending(name: str) -> str:
    name = name.rstrip("/").lower()
    last = ending(name)
    if ending(stem(name)) == ".tar":
        last = f".tar{last}"
    if not last:
        return NO_ENDING
    return last if _ENDING.fullmatch(last) else OTHER_ENDINGS
