"""Captions and seeds: those that a choice is made by, and those that a result is reported on. No one is in both.

What is chosen by figures (the settings of solvers, an objective, a recipe) is the best of several on the captions and
seeds of the choice, in part by luck. Reported figures come from captions and seeds without that luck.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lcmlora.data.sources.source import Record, read_records
from lcmlora.errors import UserError

VALIDATION, TEST = "validation.jsonl", "test.jsonl"  # of the folder that `prepare` wrote
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


def reporting(pictures: Path) -> Captions:
    """Returns the test captions: reported figures come from them, and nothing is chosen by them.

    Args:
        pictures: the folder that `prepare` wrote.

    Raises:
        UserError: there are none, or the folder was written before captions were kept apart.
    """
    path = pictures / TEST
    if not path.exists() and (pictures / VALIDATION).exists():
        raise UserError(
            f"{path}: is missing, because the pictures were prepared before test and validation captions were kept "
            "apart; run `lcmlora prepare`"
        )
    records = read_records(path)
    if not records:
        raise UserError(f"{path}: holds no pictures to compare with; raise data.test, or give the set more captions")
    return Captions(distinct_captions(records), records)


def choosing(pictures: Path) -> Captions:
    """Returns the validation captions: what is chosen by figures is chosen by theirs.

    There are none where `data.validation` is 0 or the data set has fewer than three captions.

    Args:
        pictures: the folder that `prepare` wrote.

    Raises:
        UserError: there is no such list.
    """
    records = read_records(pictures / VALIDATION)
    return Captions(distinct_captions(records), records)


def distinct_captions(records: Sequence[Record]) -> list[str]:
    """Returns every caption once, in an order of its own: the first ones, which are shown, are a fair sample."""
    return sorted({r.caption for r in records}, key=lambda caption: hashlib.blake2b(caption.encode()).digest())
