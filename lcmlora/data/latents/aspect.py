"""Aspect buckets: the shapes in which pictures are trained on, so that a wide one keeps its sides.

All have about the area of the base's square, and sides of whole units. (The scheme of NovelAI's "aspect ratio
bucketing", 2022, with which SDXL was trained: arXiv 2307.01952, section 2.3.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Size = tuple[int, int]  # height and width in pixels


def table(resolution: int, unit: int, max_aspect: float) -> list[Size]:
    """Returns all shapes, from tall to wide: of each height the widest that has no more than resolution^2 pixels."""
    found = {(resolution, resolution)}
    for side in range(unit, resolution, unit):
        other = resolution * resolution // side // unit * unit
        if other <= max_aspect * side:
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda size: size[1] / size[0])


def nearest(shapes: npt.ArrayLike, sizes: Sequence[Size]) -> npt.NDArray[np.int64]:
    """Returns for each width and height (N, 2) the number of the size whose aspect is closest, as a ratio, (N,)."""
    wide, high = np.asarray(shapes, dtype=np.float64).T
    wanted = np.log(wide / high)[:, None]
    return np.abs(wanted - np.log([width / height for height, width in sizes])).argmin(axis=1)


def chosen(shapes: npt.ArrayLike, counts: npt.ArrayLike, sizes: Sequence[Size], least: int) -> list[Size]:
    """Returns the sizes that are needed, in their order, each for `least` pictures or more, or one.

    The one with the fewest goes first, and its pictures to what is then closest, until none has too few.

    Args:
        shapes: every width and height that there is, (N, 2).
        counts: pictures of each, (N,).
    """
    left = list(sizes)
    while True:
        found = np.bincount(nearest(shapes, left), counts, minlength=len(left))
        needed = [size for size, count in zip(left, found, strict=True) if count]
        if len(needed) == len(left):
            if len(left) == 1 or found.min() >= least:
                return left
            needed.pop(int(found.argmin()))
        left = needed
