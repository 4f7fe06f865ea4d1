"""Captions and seeds: those that a choice is made by, and those that a result is reported on. No one is in both.

What is chosen by figures (the settings of solvers, an objective, a recipe) is the best of several on the captions and
seeds of the choice, in part by luck. Reported figures come from captions and seeds without that luck.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lcmlora.data.sources.source import Record, iter_records, read_records
from lcmlora.errors import UserError

VALIDATION, TEST = "validation.jsonl", "test.jsonl"  # of the folder that `prepare` wrote
GALLERY = 4  # pictures of each prompt that retrieval searches among, besides those that are compared with
_CHOOSING = 1000  # between the seeds of reports and those of choices


class Captions(NamedTuple):
    """Captions that no training sees, with their real pictures (or prompts without pictures)."""

    prompts: list[str]  # every caption once; the first ones, which are shown, are a fair sample
    records: list[Record]


@dataclass(frozen=True)
class Seeds:
    """Seeds of the noise that image sets start from."""

    teacher: int
    compared: int  # everything that is compared with the teacher, the teacher's second set among it
    gallery: int  # of retrieval, where the teacher draws it for lack of real pictures


def reporting_seeds(seed: int) -> Seeds:
    """Returns the seeds of reported figures.

    Args:
        seed: evaluation.seed.
    """
    return Seeds(teacher=seed, compared=seed + 1, gallery=seed + 2)


def choosing_seeds(seed: int) -> Seeds:
    """Returns the seeds of figures that something is chosen by; none of them is in `reporting_seeds`."""
    return reporting_seeds(seed + _CHOOSING)


def reporting(pictures: Path, most: int | None = None) -> Captions:
    """Returns the test captions: reported figures come from them, and nothing is chosen by them.

    Args:
        pictures: the folder that `prepare` wrote.
        most: how many pictures are drawn or compared; of a long list no more is returned than that takes.

    Raises:
        UserError: there are none, or the folder was written before captions were kept apart.
    """
    path = pictures / TEST
    if not path.exists() and (pictures / VALIDATION).exists():
        raise UserError(
            f"{path}: is missing, because the pictures were prepared before test and validation captions were kept "
            "apart; run `lcmlora prepare`"
        )
    found = _read(path, most)
    if not found.records:
        raise UserError(f"{path}: holds no pictures to compare with; raise data.test, or give the set more captions")
    return found


def choosing(pictures: Path, most: int | None = None) -> Captions:
    """Returns the validation captions: what is chosen by figures is chosen by theirs.

    There are none where `data.validation` is 0 or the data set has fewer than three captions.

    Args:
        pictures: the folder that `prepare` wrote.
        most: as in `reporting`.

    Raises:
        UserError: there is no such list.
    """
    return _read(pictures / VALIDATION, most)


def distinct_captions(records: Sequence[Record]) -> list[str]:
    """Returns every caption once, in an order of its own: the first ones, which are shown, are a fair sample."""
    return sorted({r.caption for r in records}, key=_draw)


def _draw(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode()).digest()


def _read(path: Path, most: int | None) -> Captions:
    """Returns the captions of a list and their records. With `most` these are the first captions in their order, and of
    each the records that come first in the list, which are shown, and those of the lowest SHA-256, which are compared
    with and searched among."""
    if most is None:
        records = read_records(path)
        return Captions(distinct_captions(records), records)
    sizes = _first_captions(path, most)
    wanted = min(most, sum(sizes.values()))
    turns = next(n for n in itertools.count() if sum(min(size, n) for size in sizes.values()) >= wanted)
    first: dict[str, list[tuple[int, Record]]] = {caption: [] for caption in sizes}
    lowest: dict[str, list[tuple[str, int, Record]]] = {caption: [] for caption in sizes}
    for place, record in enumerate(iter_records(path)):
        if record.caption in sizes:
            if len(first[record.caption]) < turns:
                first[record.caption].append((place, record))
            bisect.insort(lowest[record.caption], (record.sha256, place, record))
            del lowest[record.caption][turns + GALLERY :]
    chosen = dict(each for group in first.values() for each in group)
    chosen |= {place: record for group in lowest.values() for _, place, record in group}
    records = [chosen[place] for place in sorted(chosen)]
    return Captions(distinct_captions(records), records)


def _first_captions(path: Path, most: int) -> dict[str, int]:
    """Returns how many records the first captions have, in the order of `distinct_captions`, at most so many."""
    sizes: dict[str, int] = {}
    last: list[tuple[bytes, str]] = []  # of those captions, sorted
    for record in iter_records(path):
        if record.caption in sizes:
            sizes[record.caption] += 1
            continue
        drawn = _draw(record.caption)
        if len(last) < most or drawn < last[-1][0]:
            bisect.insort(last, (drawn, record.caption))
            sizes[record.caption] = 1
            if len(last) > most:
                del sizes[last.pop()[1]]
    return sizes
