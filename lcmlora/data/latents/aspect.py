"""Aspect buckets: the sizes to which pictures are cropped, so that a wide picture does not lose its sides.

All sizes have about the area of the base's square, and sides that are multiples of a unit. (This is NovelAI's "aspect
ratio bucketing" of 2022, with which SDXL was trained: arXiv 2307.01952, section 2.3.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Size = tuple[int, int]  # height and width in pixels


def bucket_sizes(resolution: int, unit: int, max_aspect: float) -> list[Size]:
    """Returns all sizes, from tall to wide: for each height the widest that has at most resolution^2 pixels.

    Args:
        unit: pixels; sides are multiples of it.
        max_aspect: the longer side over the shorter, at most.
    """
    sizes = {(resolution, resolution)}
    for side in range(unit, resolution, unit):
        other = resolution * resolution // side // unit * unit
        if other <= max_aspect * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda size: size[1] / size[0])


def nearest(shapes: npt.ArrayLike, sizes: Sequence[Size]) -> npt.NDArray[np.int64]:
    """Returns for each picture's width and height (N, 2) the index (N,) of the size with the closest aspect ratio."""
    width, height = np.asarray(shapes, dtype=np.float64).T
    ratios = np.log(width / height)[:, None]
    return np.abs(ratios - np.log([width / height for height, width in sizes])).argmin(axis=1)


def used_sizes(shapes: npt.ArrayLike, counts: npt.ArrayLike, sizes: Sequence[Size], least: int) -> list[Size]:
    """Returns the sizes that have at least `least` pictures, in their order; at least one size.

    The size with the fewest pictures is dropped first, and its pictures go to the size that is then closest, until no
    size has too few.

    Args:
        shapes: every distinct width and height of the pictures, (N, 2).
        counts: how many pictures have it, (N,).
    """
    used = list(sizes)
    while True:
        pictures = np.bincount(nearest(shapes, used), counts, minlength=len(used))
        not_empty = [size for size, count in zip(used, pictures, strict=True) if count]
        if len(not_empty) == len(used):
            if len(used) == 1 or pictures.min() >= least:
                return used
            not_empty.pop(int(pictures.argmin()))
        used = not_empty
