"""Near duplicates: pictures whose perceptual hashes differ in a few bits."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

_SIDE, _KEPT = 32, 8  # pixels, and the lowest frequencies of them


def perceptual_hash(picture: Image.Image) -> int:
    """Returns the picture's perceptual hash: 64 bits, which of its 8 x 8 lowest frequencies are above their median.

    Resizing, compression and small changes of colour flip a few bits. The hash of a picture of one colour is
    meaningless.
    (pHash: C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1.)
    """
    grey = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    transform = _cosines()
    low = transform @ np.asarray(grey, dtype=np.float64) @ transform.T
    bits = (low > np.median(low.flatten()[1:])).flatten()  # without the mean, which only says how light it is
    return int("".join("1" if bit else "0" for bit in bits), 2)


@cache
def _cosines() -> npt.NDArray[np.float64]:
    """Returns the lowest rows of the discrete cosine transform (type II), (8, 32)."""
    rows, columns = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * rows * (2 * columns + 1) / (2 * _SIDE))


class NearDuplicates:
    """The perceptual hashes of the pictures seen so far.

    Two hashes that differ in at most `bits` bits are equal in at least one of `bits` + 1 bands, so only hashes that
    share a band are compared, and no pair is missed.
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        edges = [64 * band // (bits + 1) for band in range(bits + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self._seen: list[dict[int, list[int]]] = [{} for _ in self._bands]

    def has_or_add(self, picture_hash: int) -> bool:
        """Returns whether an earlier hash differs in at most `bits` bits; if none does, adds this one."""
        keys = [picture_hash >> low & mask for low, mask in self._bands]
        for seen, key in zip(self._seen, keys, strict=True):
            if any((picture_hash ^ earlier).bit_count() <= self._bits for earlier in seen.get(key, ())):
                return True
        for seen, key in zip(self._seen, keys, strict=True):
            seen.setdefault(key, []).append(picture_hash)
        return False
