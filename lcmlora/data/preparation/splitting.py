"""The split of captions into train, validation and test by their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Part = Literal["train", "validation", "test"]

Levels = npt.NDArray[np.float64]


class Limits(NamedTuple):
    """Captions with a level below `test` are for test, other ones below `validation` for validation."""

    test: float
    validation: float

    def part(self, level: float) -> Part:
        if level < self.test:
            return "test"
        return "validation" if level < self.validation else "train"

    def sizes(self, levels: Levels) -> dict[Part, int]:
        """Returns how many of the levels are in each part."""
        test, held_out = int((levels < self.test).sum()), int((levels < max(self)).sum())
        return {"train": len(levels) - held_out, "validation": held_out - test, "test": test}


def level(caption: str, seed: int) -> float:
    """Returns the caption's number in [0, 1), which depends on the seed and not on the case of letters."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{caption.casefold()}".encode()).digest()[:8], "big") / 2**64


def find_limits(levels: Callable[[], Iterable[Levels]], validation: float, test: float) -> Limits:
    """Returns the limits with about these shares below them.

    One level at least is for test and one for training, so that there are none of either where there are fewer than
    two. Of three or more, one at least is for validation, unless `validation` is 0.

    Args:
        levels: returns the levels of all captions, a few at a time and any number of times.
    """
    lowest = highest = np.empty(0)
    for some in levels():
        distinct = np.unique(some)
        lowest = np.unique(np.concatenate([lowest, distinct[:2]]))[:2]
        highest = np.unique(np.concatenate([highest, distinct[-2:]]))[-2:]
    if len(lowest) < 2:
        return Limits(0.0, 0.0)
    wanted = validation > 0 and len({*lowest, *highest}) > 2
    # The lowest level is always for test and the highest for training; the lowest of those between for validation.
    test_limit = min(max(test, lowest[1]), highest[0] if wanted else highest[1])
    if not wanted:
        return Limits(float(test_limit), float(test_limit))
    following = np.empty(0)  # the two lowest levels that are not for test
    for some in levels():
        following = np.unique(np.concatenate([following, some[some >= test_limit]]))[:2]
    return Limits(float(test_limit), float(min(max(test + validation, following[1]), highest[1])))
