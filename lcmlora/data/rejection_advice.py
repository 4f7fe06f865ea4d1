"""What a person can do where too many pictures are rejected, in the line that stops the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lcmlora.config import Data
from lcmlora.data import unused_files
from lcmlora.data.reading import candidates as reasons
from lcmlora.data.reading import tar_samples
from lcmlora.data.reading.candidates import Rejection
from lcmlora.errors import UserError
from lcmlora.plugins import SOURCES

_SHOWN = 3  # names

_LAYOUT = "put it into a .txt file of the same name, or into metadata.jsonl or metadata.csv with file_name and text"
_AGAIN = "copy or download them again, or remove them"
_REMEDIES = {
    reasons.NO_CAPTION: _LAYOUT,
    reasons.NO_NAME: "each row needs file_name, and text, caption or prompt",
    reasons.MISSING: "put the files where file_name says, as a path from the folder of the metadata",
    reasons.AMBIGUOUS: "name each file as it is spelled on disk",
    reasons.OUTSIDE: "put the files into the folder, and name them by their path from the folder of the metadata",
    reasons.LINKED: "set data.links: follow where the links can be trusted, or put the files themselves there",
    reasons.NOT_UTF8: "save captions, and name files, in UTF-8",
    reasons.LONG_CAPTION: "shorten the captions; a text encoder reads 77 tokens",
    reasons.NOT_A_PICTURE: "convert them to JPEG, PNG or WebP",
    reasons.LFS: "run git lfs pull where they were cloned",
    reasons.DAMAGED: _AGAIN,
    reasons.EMPTY: _AGAIN,
    reasons.TOO_LARGE: "make them smaller: about 89 million pixels is the most",
    reasons.UNREADABLE: "look at the permissions of the files",
}
_CHOICES = {  # by the parameter that a reason ends with
    "(data.min_side)": "take larger pictures, or lower data.min_side",
    "(data.max_aspect)": "crop them, or raise data.max_aspect",
    "(data.near_duplicates)": "lower data.near_duplicates, or set it to null",
    "(data.scores)": "look at the ranges of data.scores",
}


def is_choice(reason: str) -> bool:
    """Returns whether the reason is no fault of the data: a setting asks for the rejection, the picture or prompt is a
    duplicate, or the file is a map beside a picture."""
    return reason.endswith(tuple(_CHOICES)) or reason in (reasons.DUPLICATE, reasons.SAME_PROMPT, tar_samples.AUXILIARY)


def check_captions(data: Data, rejections: Sequence[Rejection], total: int, passed_over: dict[str, Any]) -> None:
    """Raises UserError where captions are files of their own and most pictures have none: the layout is another one."""
    if not SOURCES.get(data.source).separate_files:
        return
    without = [rejection for rejection in rejections if rejection.reason == reasons.NO_CAPTION]
    if 2 * len(without) > total and data.max_rejected < 1:
        raise UserError(
            f"{data.path}: {len(without)} of {total} {counted(data.source)} have no caption"
            f"{leading(without, passed_over)}{others(rejections, reasons.NO_CAPTION)}"
        )


def check(data: Data, rejections: Sequence[Rejection], total: int, passed_over: dict[str, Any]) -> None:
    """Raises UserError where the faults among the rejections are more than data.max_rejected lets pass."""
    check_captions(data, rejections, total, passed_over)
    faults = [rejection for rejection in rejections if not is_choice(rejection.reason)]
    if len(faults) > data.max_rejected * total:
        raise UserError(
            f"{data.path}: {len(faults)} of {total} {counted(data.source)} cannot be used, more than data.max_rejected "
            f"lets pass ({data.max_rejected:g}): {worst(faults)}{leading(faults, passed_over)}{others(faults)}"
        )


def worst(rejections: Sequence[Rejection]) -> str:
    """Returns the reason that most rejections have, and their number."""
    reason = _most(rejections)
    return f"{sum(rejection.reason == reason for rejection in rejections)} {reason}"


def leading(rejections: Sequence[Rejection], passed_over: dict[str, Any]) -> str:
    """Returns the first names that have the reason of most rejections, and what to do about it."""
    reason = _most(rejections)
    found = [rejection for rejection in rejections if rejection.reason == reason]
    names = ", ".join(reasons.shown(f"{r.name} ({r.detail})" if r.detail else r.name) for r in found[:_SHOWN])
    more = ", ..." if len(found) > _SHOWN else ""
    return f" ({names}{more}); {remedy(reason)}{_hint(reason, passed_over)}"


def others(rejections: Sequence[Rejection], leads: str = "") -> str:
    """Returns the reasons but the one that leads, by default the most frequent, with counts and first names."""
    first = {rejection.reason: rejection.name for rejection in reversed(rejections)}
    counts = Counter(rejection.reason for rejection in rejections)
    del counts[leads or _most(rejections)]
    told = [f"{count} {reason} ({reasons.shown(first[reason])})" for reason, count in counts.most_common()]
    return f"; also: {', '.join(told)}" if told else ""


def remedy(reason: str) -> str:
    for ending, choice in _CHOICES.items():
        if reason.endswith(ending):
            return choice
    return _REMEDIES.get(reason, "mend or remove them, or raise data.max_rejected")


def counted(source: str) -> str:
    """Returns what is counted of this source, in words."""
    return "pictures" if SOURCES.get(source).has_pictures else "prompts"


def _most(rejections: Sequence[Rejection]) -> str:
    """Returns the most frequent reason; where several are, the one that may have led to the others."""
    counts = Counter(rejection.reason for rejection in rejections)
    return max(counts, key=lambda reason: (counts[reason], reason != reasons.NO_CAPTION))


def _hint(reason: str, passed_over: dict[str, Any]) -> str:
    """Returns what else lies there and may be what is missing."""
    archives, tables = unused_files.archives_and_tables(passed_over)
    if reason == reasons.MISSING and archives:
        return f"; {reasons.shown(archives[0])} is not unpacked"
    if reason == reasons.NO_CAPTION and tables:
        return f"; {', '.join(map(reasons.shown, tables[:_SHOWN]))} beside them is not read"
    return ""
