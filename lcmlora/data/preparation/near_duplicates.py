"""Near duplicates among any number of pictures: the perceptual hashes of those that are kept lie in a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from lcmlora.data.duplicates import NearDuplicates

BLOCK = 1 << 15  # hashes that are compared with all kept ones at a time
_CHUNK = 1 << 18  # kept hashes that are in memory
_KEY_BITS = 16
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd; spreads the bits of a key (Fibonacci hashing)

Hashes = npt.NDArray[np.uint64]


def find_near_duplicates(blocks: Iterable[Hashes], bits: int, path: Path) -> Iterator[npt.NDArray[np.bool_]]:
    """Yields for each block of hashes which of them differ in at most `bits` bits from an earlier one that is none
    itself: what `NearDuplicates` says of one after the other.

    Args:
        path: a file for the hashes that are kept.
    """
    with path.open("w+b") as kept:
        for hashes in blocks:
            near = _near_kept(hashes, kept, bits)
            within = NearDuplicates(bits)
            for index in np.flatnonzero(~near):
                near[index] = within.has_or_add(int(hashes[index]))
            kept.seek(0, 2)
            kept.write(hashes[~near].tobytes())
            yield near


def _near_kept(hashes: Hashes, kept: IO[bytes], bits: int) -> npt.NDArray[np.bool_]:
    """Returns which hashes differ in at most `bits` bits from one in the file.

    Of `bits` + 2 bands of a hash two at least are equal in both, so for each pair of bands those are compared that have
    them in common. Hashes of the block are looked up by 16 bits that follow from the two bands.
    """
    near = np.zeros(len(hashes), bool)
    for mask in _masks(bits):
        keys = _keys(hashes, mask)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange((1 << _KEY_BITS) + 1))
        for chunk in _chunks(kept):
            keys = _keys(chunk, mask)
            first, end = starts[keys], starts[keys + 1]
            while len(compared := np.flatnonzero(first < end)):
                chunk, first, end = chunk[compared], first[compared], end[compared]
                members = order[first]
                near[members[np.bitwise_count(chunk ^ hashes[members]) <= bits]] = True
                first = first + 1
    return near


def _masks(bits: int) -> list[np.uint64]:
    count = bits + 2
    edges = [64 * band // count for band in range(count + 1)]
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [np.uint64(one | other) for one, other in itertools.combinations(bands, 2)]


def _keys(hashes: Hashes, mask: np.uint64) -> npt.NDArray[np.int64]:
    return ((hashes & mask) * _SPREAD >> np.uint64(64 - _KEY_BITS)).astype(np.int64)


def _chunks(kept: IO[bytes]) -> Iterator[Hashes]:
    kept.seek(0)
    while content := kept.read(8 * _CHUNK):
        yield np.frombuffer(content, np.uint64)
