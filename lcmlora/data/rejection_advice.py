"""The error of a run that stops because too many pictures are rejected: the reasons, and what to do about them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from lcmlora.config import Data
from lcmlora.data.reading import candidates as reasons
from lcmlora.data.reading import tar_samples
from lcmlora.data.reading.candidates import Rejection, display_name
from lcmlora.data.unused_files import Tally, archives_and_tables
from lcmlora.errors import UserError
from lcmlora.plugins import SOURCES

_EXAMPLES = 3  # names that an error lists for a reason
_KEPT = 12  # rejections of each reason that are kept as examples

_ADD_CAPTIONS = (
    "put it into a .txt file of the same name, or into metadata.jsonl or metadata.csv with file_name and text"
)
_COPY_AGAIN = "copy or download them again, or remove them"
_REMEDIES = {
    reasons.NO_CAPTION: _ADD_CAPTIONS,
    reasons.NO_NAME: "each row needs file_name, and text, caption or prompt",
    reasons.MISSING: "put the files where file_name says, as a path from the folder of the metadata",
    reasons.AMBIGUOUS: "name each file as it is spelled on disk",
    reasons.OUTSIDE: "put the files into the folder, and name them by their path from the folder of the metadata",
    reasons.LINKED: "set data.links: follow where the links can be trusted, or put the files themselves there",
    reasons.NOT_UTF8: "save captions, and name files, in UTF-8",
    reasons.LONG_CAPTION: "shorten the captions; a text encoder reads 77 tokens",
    reasons.NOT_A_PICTURE: "convert them to JPEG, PNG or WebP",
    reasons.LFS_POINTER: "run git lfs pull where they were cloned",
    reasons.DAMAGED: _COPY_AGAIN,
    reasons.EMPTY: _COPY_AGAIN,
    reasons.TOO_LARGE: "make them smaller: about 89 million pixels is the most",
    reasons.UNREADABLE: "look at the permissions of the files",
}
_SETTING_REMEDIES = {  # by the setting that a reason ends with
    "(data.min_side)": "take larger pictures, or lower data.min_side",
    "(data.max_aspect)": "crop them, or raise data.max_aspect",
    "(data.near_duplicates)": "lower data.near_duplicates, or set it to null",
    "(data.scores)": "look at the ranges of data.scores",
}


class ByReason:
    """Rejections, counted by their reason; the first of each are kept.

    Attributes:
        counts, first: by reason, in the order in which the reasons came.
    """

    def __init__(self, rejections: Iterable[Rejection] = ()) -> None:
        self.counts = Counter[str]()
        self.first = defaultdict[str, list[Rejection]](list)
        for rejection in rejections:
            self.add(rejection)

    def add(self, rejection: Rejection) -> None:
        self.counts[rejection.reason] += 1
        if len(first := self.first[rejection.reason]) < _KEPT:
            first.append(rejection)

    def only(self, wanted: Callable[[str], bool]) -> ByReason:
        """Returns those whose reasons are wanted."""
        found = ByReason()
        for reason in filter(wanted, self.counts):
            found.counts[reason], found.first[reason] = self.counts[reason], self.first[reason]
        return found


def is_intended(reason: str) -> bool:
    """Returns whether the reason is no fault of the data: a setting asks for the rejection, the picture or prompt is a
    duplicate, or the file is a map beside a picture."""
    return reason.endswith(tuple(_SETTING_REMEDIES)) or reason in (
        reasons.DUPLICATE,
        reasons.SAME_PROMPT,
        tar_samples.AUXILIARY,
    )


def check_captions(data: Data, rejections: ByReason, total: int, unused_files: dict[str, Tally]) -> None:
    """Raises UserError if captions are files of their own and most pictures have none: the layout must be another."""
    if not SOURCES.get(data.source).separate_files:
        return
    without = rejections.counts[reasons.NO_CAPTION]
    if 2 * without > total and data.max_rejected < 1:
        raise UserError(
            f"{data.path}: {without} of {total} {unit_of(data.source)} have no caption"
            f"{_examples_and_remedy(rejections, reasons.NO_CAPTION, unused_files)}"
            f"{_other_reasons(rejections, reasons.NO_CAPTION)}"
        )


def check_rejections(data: Data, rejections: ByReason, total: int, unused_files: dict[str, Tally]) -> None:
    """Raises UserError if the share of faulty pictures exceeds data.max_rejected."""
    check_captions(data, rejections, total, unused_files)
    faults = rejections.only(lambda reason: not is_intended(reason))
    if (count := faults.counts.total()) > data.max_rejected * total:
        raise UserError(
            f"{data.path}: {count} of {total} {unit_of(data.source)} cannot be used, more than data.max_rejected "
            f"lets pass ({data.max_rejected:g}): {summary(faults, unused_files)}"
        )


def summary(rejections: ByReason, unused_files: dict[str, Tally]) -> str:
    """Returns the most frequent reason with its count, first names and remedy, then the other reasons."""
    reason = _most_frequent(rejections.counts)
    examples = _examples_and_remedy(rejections, reason, unused_files)
    return f"{rejections.counts[reason]} {reason}{examples}{_other_reasons(rejections, reason)}"


def remedy(reason: str) -> str:
    """Returns what a person can do about a reason."""
    for ending, by_setting in _SETTING_REMEDIES.items():
        if reason.endswith(ending):
            return by_setting
    return _REMEDIES.get(reason, "mend or remove them, or raise data.max_rejected")


def unit_of(source: str) -> str:
    """Returns the word for what this source consists of."""
    return "pictures" if SOURCES.get(source).has_pictures else "prompts"


def _examples_and_remedy(rejections: ByReason, reason: str, unused_files: dict[str, Tally]) -> str:
    """Returns the first names with a reason, and its remedy."""
    examples = rejections.first[reason][:_EXAMPLES]
    names = ", ".join(display_name(f"{r.name} ({r.detail})" if r.detail else r.name) for r in examples)
    more = ", ..." if rejections.counts[reason] > _EXAMPLES else ""
    return f" ({names}{more}); {remedy(reason)}{_hint(reason, unused_files)}"


def _other_reasons(rejections: ByReason, except_reason: str) -> str:
    """Returns all reasons but one, each with its count and first name; empty if there are no others."""
    others = rejections.only(lambda reason: reason != except_reason)
    parts = [
        f"{count} {reason} ({display_name(others.first[reason][0].name)})"
        for reason, count in others.counts.most_common()
    ]
    return f"; also: {', '.join(parts)}" if parts else ""


def _most_frequent(counts: Counter[str]) -> str:
    """Returns the most frequent reason; of several, one that may have caused the others (a missing caption did not)."""
    return max(counts, key=lambda reason: (counts[reason], reason != reasons.NO_CAPTION))


def _hint(reason: str, unused_files: dict[str, Tally]) -> str:
    """Returns which unused file may hold the missing pictures or captions; empty if there is none."""
    archives, tables = archives_and_tables(unused_files)
    if reason == reasons.MISSING and archives:
        return f"; {display_name(archives[0])} is not unpacked"
    if reason == reasons.NO_CAPTION and tables:
        return f"; {', '.join(map(display_name, tables[:_EXAMPLES]))} beside them is not read"
    return ""
