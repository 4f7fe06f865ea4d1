"""Files below `data.path` that nothing is made of, counted by what they are: none vanishes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from lcmlora.data.reading.candidates import printable

_NAMED = 10  # names listed of each kind
_KINDS = 100  # an ending may be made up for every file
_ENDING = re.compile(r"(?:\.tar)?\.[a-z0-9_~-]{1,12}")

HIDDEN = "hidden (a name that begins with a dot)"
REPEATED = "links to folders that are read under another name"
UNUSED = "captions without a picture"
SECOND = "captions of pictures that have another"
PLAIN = "without an ending"
OTHERS = "other endings"

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
TABLES = (".jsonl", ".csv", ".parquet", ".json", ".tsv", ".xlsx", ".txt", ".arrow")


class Census:
    """Names by kind: counts of all, and the first few."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def add(self, names: Iterable[str], kind: str | None = None) -> None:
        """Counts these names under a kind, by default each under its own ending."""
        for name in names:
            told = kind or _ending(name)
            if told not in self._counts and len(self._counts) >= _KINDS:
                told = OTHERS
            self._counts[told] = self._counts.get(told, 0) + 1
            first = self._first.setdefault(told, [])
            if len(first) < _NAMED:
                first.append(printable(name))

    def report(self) -> dict[str, Any]:
        """Returns {kind: {count, first}}, the most frequent kind first."""
        kinds = sorted(self._counts, key=lambda kind: (-self._counts[kind], kind))
        return {kind: {"count": self._counts[kind], "first": self._first[kind]} for kind in kinds}


def archives_and_tables(report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the first names of what may be packed pictures, and of what may be captions, of a census' report."""
    first = [name for told in report.values() for name in told["first"][:1]]
    ending = {name: PurePosixPath(name).suffix.lower() for name in first}
    return [n for n in first if ending[n] in ARCHIVES], [n for n in first if ending[n] in TABLES]


def told(report: dict[str, Any], most: int = 5) -> str:
    """Returns a census' report in a few words: 12 .jxl, 3 .zip."""
    shown = [f"{found['count']} {kind}" for kind, found in list(report.items())[:most]]
    return ", ".join(shown) + (", ..." if len(report) > most else "")


def _ending(name: str) -> str:
    path = PurePosixPath(name)
    ending = path.suffix.lower()
    if PurePosixPath(path.stem).suffix.lower() == ".tar":
        ending = f".tar{ending}"
    if not ending:
        return PLAIN
    return ending if _ENDING.fullmatch(ending) else OTHERS
