"""Sets and bits for as many pictures as there are: on disk, or a bit each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

_BITS = 9  # of a digest, which decide its file: 512 files
_BUFFERED = 1 << 14  # rows
_ROW = np.dtype([("digest", "<u8", 2), ("value", "<u8")])

Rows = npt.NDArray[np.void]


class Digests:
    """Texts by their digests, each with a number, in files by the digest's first bits: equal texts are in one file."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: where the files are put; they have a name of their own.
        """
        self._folder = folder
        self._digests = bytearray()
        self._values: list[int] = []
        folder.mkdir()

    def add(self, text: str, value: int) -> None:
        self._digests += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._values.append(value)
        if len(self._values) == _BUFFERED:
            self._write()

    def groups(self) -> Iterator[tuple[Rows, npt.NDArray[np.int64]]]:
        """Yields the rows of one file after the other, sorted by text and number, and the index of the first row of
        the same text for each."""
        self._write()
        for path in sorted(self._folder.iterdir()):
            rows = np.fromfile(path, _ROW)
            rows = rows[np.lexsort((rows["value"], rows["digest"][:, 1], rows["digest"][:, 0]))]
            is_first = np.ones(len(rows), bool)
            is_first[1:] = (rows["digest"][1:] != rows["digest"][:-1]).any(axis=1)
            yield rows, np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))

    def _write(self) -> None:
        if not self._values:
            return
        rows = np.empty(len(self._values), _ROW)
        rows["digest"] = np.frombuffer(bytes(self._digests), "<u8").reshape(-1, 2)
        rows["value"] = self._values
        files = rows["digest"][:, 0] >> np.uint64(64 - _BITS)
        rows = rows[np.argsort(files, kind="stable")]
        numbers, starts = np.unique(np.sort(files), return_index=True)
        for number, part in zip(numbers, np.split(rows, starts[1:]), strict=True):
            with (self._folder / f"{number:03d}").open("ab") as file:
                part.tofile(file)
        self._digests.clear()
        self._values.clear()


class Bits:
    """A bit for each picture."""

    def __init__(self, count: int) -> None:
        self._bytes = np.zeros(count // 8 + 1, np.uint8)

    def set(self, indices: npt.NDArray[np.uint64]) -> None:
        masks = np.left_shift(1, indices & np.uint64(7)).astype(np.uint8)
        np.bitwise_or.at(self._bytes, indices >> np.uint64(3), masks)

    def at(self, indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        return (self._bytes[indices >> np.uint64(3)] >> (indices & np.uint64(7)).astype(np.uint8) & 1).astype(bool)

    def __getitem__(self, index: int) -> bool:
        return bool(self._bytes[index >> 3] >> (index & 7) & 1)
