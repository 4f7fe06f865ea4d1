"""Decides which pictures are kept: of good size, and no duplicate of an earlier one. Works on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lcmlora.config import Data
from lcmlora.data.preparation.near_duplicates import BLOCK, Hashes, find_near_duplicates
from lcmlora.data.preparation.partitions import Bits, Digests
from lcmlora.data.reading.candidates import DUPLICATE
from lcmlora.plugins import SOURCES

NEAR_DUPLICATE = "looks like another picture (data.near_duplicates)"

_LOOK = np.dtype([("index", "<u8"), ("look", "<u8")])


class Selection:
    """The records of a source, and why some of them are not kept.

    Attributes:
        count: of the records.
    """

    def __init__(self, records: Iterable[bytes], data: Data, folder: Path) -> None:
        """Reads all records once.

        Args:
            records: their lines; they can be iterated over again.
            folder: for files of this object.
        """
        self._records = records
        self._data = data
        self._has_pictures: bool = SOURCES.get(data.source).has_pictures
        self.count = 0
        digests = Digests(folder / "digests")
        with (folder / "looks").open("w+b") as looks:
            for line in records:
                record = json.loads(line)
                if not self._bad_size(record):
                    digests.add(record["sha256"], self.count)
                    if look := record.get("look"):
                        looks.write(np.array((self.count, int(look, 16)), _LOOK).tobytes())
                self.count += 1
            self._duplicates, self._near = Bits(self.count), Bits(self.count)
            with (folder / "pairs").open("w+b") as pairs:  # duplicates, and the first picture of the same bytes
                for rows, firsts in digests.groups():
                    later = np.flatnonzero(firsts != np.arange(len(rows)))
                    values = rows["value"]
                    self._duplicates.set(values[later])
                    pairs.write(np.stack([values[later], values[firsts[later]]], axis=1).tobytes())
                if looks.tell():
                    self._find_near_duplicates(looks, pairs, folder)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yields each record, and why it is not kept, which is empty if it is."""
        for index, line in enumerate(self._records):
            record = json.loads(line)
            reason = self._bad_size(record)
            if not reason and self._near[index]:
                reason = NEAR_DUPLICATE
            if not reason and self._duplicates[index]:
                reason = DUPLICATE
            yield record, reason

    def _find_near_duplicates(self, looks: Any, pairs: Any, folder: Path) -> None:
        indices = list[Hashes]()

        def blocks() -> Iterator[Hashes]:
            looks.seek(0)
            while content := looks.read(_LOOK.itemsize * BLOCK):
                rows = np.frombuffer(content, _LOOK)
                rows = rows[~self._duplicates.at(rows["index"])]
                indices.append(rows["index"])
                yield rows["look"]

        for near in find_near_duplicates(blocks(), self._data.near_duplicates or 0, folder / "kept-looks"):
            self._near.set(indices.pop()[near])
        # What has the bytes of a near duplicate is one, too: nothing with these bytes is kept.
        pairs.seek(0)
        while content := pairs.read(16 * BLOCK):
            later, first = np.frombuffer(content, "<u8").reshape(-1, 2).T
            self._near.set(later[self._near.at(first)])

    def _bad_size(self, record: dict[str, Any]) -> str:
        """Returns why the picture's size is not accepted, as a reason; empty if it is."""
        if not self._has_pictures:
            return ""
        short, long = sorted((record["width"], record["height"]))
        if short < self._data.min_side:
            return f"shorter side under {self._data.min_side} pixels (data.min_side)"
        if long > self._data.max_aspect * short:
            return f"longer side over {self._data.max_aspect:g} times the shorter (data.max_aspect)"
        return ""
