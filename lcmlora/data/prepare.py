"""Stage `prepare`: the pictures that are kept, split by caption into train, validation and test, and a report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lcmlora.config import Data
from lcmlora.data import rejection_advice
from lcmlora.data.duplicates import Looks
from lcmlora.data.reading.candidates import DUPLICATE, printable, shown
from lcmlora.data.rejections import write as write_rejections
from lcmlora.data.sources.source import Found, Record, Rejection, survey, write_records
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, write_json
from lcmlora.plugins import SOURCES

ALIKE = "looks like another picture (data.near_duplicates)"

PARTS = ("train", "validation", "test")  # of the captions; each has a list of pictures, such as test.jsonl

_OFFENDERS = 10  # names listed for each reason
_KINDS = 12  # of files that are not read, in the printed table


def prepare(data: Data, minimum: int, out: Path) -> dict[str, Any]:
    """Writes train.jsonl, validation.jsonl, test.jsonl and report.json to the folder `out`; returns the report.

    Where something was dropped, rejected.parquet has it all, and rejected.html shows examples.

    Args:
        minimum: training pictures without which training cannot start (one batch).

    Raises:
        UserError: nothing to read, or less than `minimum` left; then `out` is as it was before.
    """
    found = survey(data)
    rejections = found.rejections
    read = len(found.records) + len(rejections)
    if read:
        rejection_advice.check(data, rejections, read, found.passed_over)
    kept = []
    seen: set[str] = set()
    looks = Looks(data.near_duplicates or 0)
    for record in found.records:
        reason = _unwanted(record, data) or (DUPLICATE if record.sha256 in seen else "")
        if not reason and record.look is not None and looks.add(int(record.look, 16)):
            reason = ALIKE
        if reason:
            rejections.append(Rejection(record.key, reason, record.place or record.key))
        else:
            seen.add(record.sha256)
            kept.append(record)
    held_out = hold_out({r.caption for r in kept}, data.validation, data.test, data.seed)
    parts = {
        "train": [r for r in kept if r.caption not in held_out.validation | held_out.test],
        "validation": [r for r in kept if r.caption in held_out.validation],
        "test": [r for r in kept if r.caption in held_out.test],
    }
    report: dict[str, Any] = {
        "source": data.source,
        "read": read,
        "kept": len(kept),
        "dropped": _by_reason(rejections),
    }
    report |= {part: _count(records) for part, records in parts.items()}
    report |= _also(found, kept)
    if len(parts["train"]) < minimum or not parts["test"]:
        raise UserError(_too_few(data, report, minimum, rejections, found.passed_over))
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

    def lot(caption: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}/{caption.casefold()}".encode()).digest()[:8], "big") / 2**64

    lots = {caption: lot(caption) for caption in captions}
    levels = sorted(set(lots.values()))
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
        validation={caption for caption, value in lots.items() if test_limit <= value < limit},
        test={caption for caption, value in lots.items() if value < test_limit},
    )


def print_report(report: dict[str, Any]) -> None:
    """Prints the report of `prepare` as a short table to standard error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    counted = rejection_advice.counted(report["source"])
    table = Table(counted, "count", "first of them", title=f"data: {report['source']}", title_justify="left")

    def add(what: str, found: dict[str, Any]) -> None:
        names = ", ".join(map(shown, found["first"][:3])) + (", ..." if found["count"] > 3 else "")
        table.add_row(escape(shown(what)), str(found["count"]), escape(names))

    table.add_row("read", str(report["read"]), "")
    for reason, dropped in report["dropped"].items():
        add(f"dropped: {reason}", dropped)
    for split, left in report.get("left_out", {}).items():
        add(f"left out: {split} (data.split)", left)
    for kind, files in list(report.get("passed_over", {}).items())[:_KINDS]:
        add(f"not read: files {kind}" if kind.startswith(".") else f"not read: {kind}", files)
    if (kinds := len(report.get("passed_over", {}))) > _KINDS:
        table.add_row(f"not read: {kinds - _KINDS} further kinds of files (report.json)", "", "")
    for note, noted in report.get("noted", {}).items():
        add(f"used, but {note}", noted)
    if "cleaned" in report:
        add("captions that lost HTML or addresses", report["cleaned"])
    for part in PARTS:
        table.add_row(part, str(report[part]["pictures"]), f"{report[part]['captions']} captions")
    Console(stderr=True).print(table)


def _also(found: Found, kept: list[Record]) -> dict[str, Any]:
    """Returns the parts of a report that are there only where they say something."""
    unit = "pictures" if found.of_pictures else "files"
    left_out = {
        split: {"of": unit, "count": len(names), "first": [printable(name) for name in names[:_OFFENDERS]]}
        for split, names in found.left_out.items()
    }
    cleaned = [record.key for record in kept if record.raw_caption is not None]
    parts = {
        "left_out": left_out,
        "passed_over": found.passed_over,
        "noted": _by_reason(Rejection(record.key, record.note) for record in kept if record.note),
        "cleaned": {"count": len(cleaned), "first": cleaned[:_OFFENDERS]} if cleaned else {},
    }
    return {name: part for name, part in parts.items() if part}


def _unwanted(record: Record, data: Data) -> str:
    if not SOURCES.get(data.source).has_pictures:
        return ""
    short, long = sorted((record.width, record.height))
    if short < data.min_side:
        return f"shorter side under {data.min_side} pixels (data.min_side)"
    if long > data.max_aspect * short:
        return f"longer side over {data.max_aspect:g} times the shorter (data.max_aspect)"
    return ""


def _by_reason(rejections: Iterable[Rejection]) -> dict[str, Any]:
    reasons: dict[str, list[str]] = {}
    for rejection in rejections:
        reasons.setdefault(rejection.reason, []).append(rejection.name)
    return {reason: {"count": len(names), "first": names[:_OFFENDERS]} for reason, names in sorted(reasons.items())}


def _count(records: list[Record]) -> dict[str, int]:
    return {"pictures": len(records), "captions": len({r.caption for r in records})}


def _too_few(
    data: Data, report: dict[str, Any], minimum: int, rejections: list[Rejection], passed_over: dict[str, Any]
) -> str:
    counted = rejection_advice.counted(data.source)
    if report["train"]["pictures"] >= minimum:
        return (
            f"{data.path}: all {report['kept']} {counted} that are left have one caption; data.test holds out whole "
            "captions, so there must be two at least"
        )
    held_out = [report[part]["pictures"] for part in ("validation", "test")]
    left = (
        f"{report['train']['pictures']} training {counted} are left and one batch needs {minimum}; "
        f"read {report['read']}, held out for validation {held_out[0]}, for test {held_out[1]}"
    )
    most = max((dropped["count"] for dropped in report["dropped"].values()), default=0)
    if 2 * most > len(rejections) and (most >= report["kept"] or report["train"]["pictures"] + most >= minimum):
        worst, leading = rejection_advice.worst(rejections), rejection_advice.leading(rejections, passed_over)
        return f"{data.path}: {left}, dropped: {worst}{leading}{rejection_advice.others(rejections)}"
    reasons = ", ".join(f"{d['count']} {reason}" for reason, d in report["dropped"].items()) or "none"
    return (
        f"{data.path}: {left}, dropped: {reasons}; "
        f"add {counted}, or lower distill.batch or the limits under data in params.yaml"
    )
