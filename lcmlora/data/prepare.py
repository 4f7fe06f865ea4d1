"""Stage `prepare`: reads the source, drops what cannot be used, and splits the rest into train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

from lcmlora.config import Data
from lcmlora.data import rejection_advice
from lcmlora.data.duplicates import NearDuplicates
from lcmlora.data.reading.candidates import DUPLICATE, display_name
from lcmlora.data.rejections import write_rejections
from lcmlora.data.sources.source import Record, Rejection, Survey, survey, write_records
from lcmlora.data.unused_files import Tally, tally
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, write_json
from lcmlora.plugins import SOURCES

NEAR_DUPLICATE = "looks like another picture (data.near_duplicates)"

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")  # each has a list of pictures, such as test.jsonl

_PRINTED_KINDS = 12  # kinds of unused files in the printed table


class SplitSize(TypedDict):
    """How many pictures one split has, and how many different captions."""

    pictures: int
    captions: int


class LeftOut(Tally):
    """Files or pictures of a split that `data.split` leaves out; `of` says which of the two."""

    of: str


class Report(TypedDict):
    """The content of report.json.

    Attributes:
        read: pictures (or prompts) that the source has: kept and dropped ones.
        dropped: rejections by their reason.
        left_out: by split, what `data.split` leaves out.
        passed_over: files that are not used, by their kind.
        noted: used pictures of which something could not be read, by what that is.
        cleaned: pictures whose caption lost HTML or addresses.
    """

    source: str
    read: int
    kept: int
    dropped: dict[str, Tally]
    train: SplitSize
    validation: SplitSize
    test: SplitSize
    left_out: NotRequired[dict[str, LeftOut]]
    passed_over: NotRequired[dict[str, Tally]]
    noted: NotRequired[dict[str, Tally]]
    cleaned: NotRequired[Tally]


def prepare_pictures(data: Data, minimum: int, out: Path) -> Report:
    """Writes train.jsonl, validation.jsonl, test.jsonl and report.json to the folder `out`; returns the report.

    If anything was dropped, rejected.parquet lists all of it, and rejected.html shows examples.

    Args:
        minimum: training pictures without which training cannot start (one batch).

    Raises:
        UserError: there is nothing to read, or fewer than `minimum` training pictures are left; then `out` is as it
            was before.
    """
    found = survey(data)
    read = len(found.records) + len(found.rejections)
    if read:
        rejection_advice.check_rejections(data, found.rejections, read, found.unused_files)
    kept, dropped = _select(found.records, data)
    rejections = found.rejections + dropped
    held_out = hold_out({r.caption for r in kept}, data.validation, data.test, data.seed)
    parts: dict[Part, list[Record]] = {
        "train": [r for r in kept if r.caption not in held_out.validation | held_out.test],
        "validation": [r for r in kept if r.caption in held_out.validation],
        "test": [r for r in kept if r.caption in held_out.test],
    }
    report: Report = {
        "source": data.source,
        "read": read,
        "kept": len(kept),
        "dropped": _tally_by_reason(rejections),
        "train": _size(parts["train"]),
        "validation": _size(parts["validation"]),
        "test": _size(parts["test"]),
    }
    _add_optional_parts(report, found, kept)
    if len(parts["train"]) < minimum or not parts["test"]:
        raise UserError(_too_few_message(data, report, minimum, rejections, found.unused_files))
    with atomic_folder(out) as folder:
        for part, records in parts.items():
            write_records(folder / f"{part}.jsonl", records)
        write_json(folder / "report.json", report)
        if rejections:
            write_rejections(folder, data, rejections)
    return report


class HeldOut(NamedTuple):
    """The captions that are kept from training."""

    validation: set[str]
    test: set[str]


def hold_out(captions: set[str], validation: float, test: float, seed: int) -> HeldOut:
    """Returns about these shares of the captions for validation and for test.

    One caption at least is for test and one for training, so that there are none of either where there are fewer than
    two. Of three or more, one at least is for validation, unless `validation` is 0.

    Apart from these bounds each caption is judged by its own hash: a data set that grows moves no caption from one
    part to another. Captions that differ in case only belong to the same part.
    """

    def draw(caption: str) -> float:
        """Returns the caption's number in [0, 1), which depends on the seed."""
        return int.from_bytes(hashlib.sha256(f"{seed}/{caption.casefold()}".encode()).digest()[:8], "big") / 2**64

    draws = {caption: draw(caption) for caption in captions}
    levels = sorted(set(draws.values()))
    if len(levels) < 2:
        return HeldOut(set(), set())
    wanted = validation > 0 and len(levels) > 2
    # The lowest hash is always for test and the highest for training; the lowest of those between for validation.
    test_limit = min(max(test, levels[1]), levels[-2] if wanted else levels[-1])
    limit = test_limit
    if wanted:
        following = next(level for level in levels if level > min(v for v in levels if v >= test_limit))
        limit = min(max(test + validation, following), levels[-1])
    return HeldOut(
        validation={caption for caption, value in draws.items() if test_limit <= value < limit},
        test={caption for caption, value in draws.items() if value < test_limit},
    )


def print_report(report: Report) -> None:
    """Prints the report of `prepare_pictures` as a short table to standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    unit = rejection_advice.unit_of(report["source"])
    table = Table(unit, "count", "first of them", title=f"data: {report['source']}", title_justify="left")

    def add(title: str, names: Tally) -> None:
        first = ", ".join(map(display_name, names["first"][:3])) + (", ..." if names["count"] > 3 else "")
        table.add_row(escape(display_name(title)), str(names["count"]), escape(first))

    table.add_row("read", str(report["read"]), "")
    for reason, dropped in report["dropped"].items():
        add(f"dropped: {reason}", dropped)
    for split, left_out in report.get("left_out", {}).items():
        add(f"left out: {split} (data.split)", left_out)
    unused = report.get("passed_over", {})
    for kind, files in list(unused.items())[:_PRINTED_KINDS]:
        add(f"not read: files {kind}" if kind.startswith(".") else f"not read: {kind}", files)
    if len(unused) > _PRINTED_KINDS:
        table.add_row(f"not read: {len(unused) - _PRINTED_KINDS} further kinds of files (report.json)", "", "")
    for note, noted in report.get("noted", {}).items():
        add(f"used, but {note}", noted)
    if "cleaned" in report:
        add("captions that lost HTML or addresses", report["cleaned"])
    for part in PARTS:
        table.add_row(part, str(report[part]["pictures"]), f"{report[part]['captions']} captions")
    Console(stderr=True).print(table)


def _select(records: Iterable[Record], data: Data) -> tuple[list[Record], list[Rejection]]:
    """Returns the records to keep, and rejections of those with a bad size and of duplicates of an earlier record."""
    kept: list[Record] = []
    rejections: list[Rejection] = []
    digests: set[str] = set()
    near_duplicates = NearDuplicates(data.near_duplicates or 0)
    for record in records:
        reason = _bad_size(record, data) or (DUPLICATE if record.sha256 in digests else "")
        if not reason and record.look is not None and near_duplicates.has_or_add(int(record.look, 16)):
            reason = NEAR_DUPLICATE
        if reason:
            rejections.append(Rejection(record.key, reason, record.place or record.key))
        else:
            digests.add(record.sha256)
            kept.append(record)
    return kept, rejections


def _bad_size(record: Record, data: Data) -> str:
    """Returns why the picture's size is not accepted, as a reason; empty if it is."""
    if not SOURCES.get(data.source).has_pictures:
        return ""
    short, long = sorted((record.width, record.height))
    if short < data.min_side:
        return f"shorter side under {data.min_side} pixels (data.min_side)"
    if long > data.max_aspect * short:
        return f"longer side over {data.max_aspect:g} times the shorter (data.max_aspect)"
    return ""


def _add_optional_parts(report: Report, found: Survey, kept: list[Record]) -> None:
    """Adds to the report the parts that are left out of it if they are empty."""
    unit = "pictures" if found.of_pictures else "files"
    left_out: dict[str, LeftOut] = {split: {"of": unit, **tally(names)} for split, names in found.left_out.items()}
    if left_out:
        report["left_out"] = left_out
    if found.unused_files:
        report["passed_over"] = found.unused_files
    if noted := _tally_by_reason(Rejection(record.key, record.note) for record in kept if record.note):
        report["noted"] = noted
    if cleaned := [record.key for record in kept if record.raw_caption is not None]:
        report["cleaned"] = tally(cleaned)


def _tally_by_reason(rejections: Iterable[Rejection]) -> dict[str, Tally]:
    names: dict[str, list[str]] = {}
    for rejection in rejections:
        names.setdefault(rejection.reason, []).append(rejection.name)
    return {reason: tally(names[reason]) for reason in sorted(names)}


def _size(records: list[Record]) -> SplitSize:
    return {"pictures": len(records), "captions": len({r.caption for r in records})}


def _too_few_message(
    data: Data, report: Report, minimum: int, rejections: list[Rejection], unused_files: dict[str, Tally]
) -> str:
    """Returns the error's text: how many pictures are left, the reasons of the dropped ones, and what to do."""
    unit = rejection_advice.unit_of(data.source)
    if report["train"]["pictures"] >= minimum:
        return (
            f"{data.path}: all {report['kept']} {unit} that are left have one caption; data.test holds out whole "
            "captions, so there must be two at least"
        )
    held_out = [report[part]["pictures"] for part in ("validation", "test")]
    left = (
        f"{report['train']['pictures']} training {unit} are left and one batch needs {minimum}; "
        f"read {report['read']}, held out for validation {held_out[0]}, for test {held_out[1]}"
    )
    most = max((dropped["count"] for dropped in report["dropped"].values()), default=0)
    if 2 * most > len(rejections) and (most >= report["kept"] or report["train"]["pictures"] + most >= minimum):
        return f"{data.path}: {left}, dropped: {rejection_advice.summary(rejections, unused_files)}"
    reasons = ", ".join(f"{d['count']} {reason}" for reason, d in report["dropped"].items()) or "none"
    return (
        f"{data.path}: {left}, dropped: {reasons}; "
        f"add {unit}, or lower distill.batch or the limits under data in params.yaml"
    )
