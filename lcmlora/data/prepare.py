"""Stage `prepare`: which pictures are kept, which captions are held out, and a report of all that was dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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

_OFFENDERS = 10  # names listed for each reason
_KINDS = 12  # of files that are not read, in the printed table


def prepare(data: Data, minimum: int, out: Path) -> dict[str, Any]:
    """Writes train.jsonl, validation.jsonl and report.json to the folder `out`; returns the report.

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
    held_out = choose_validation({r.caption for r in kept}, data.validation, data.seed)
    train = [r for r in kept if r.caption not in held_out]
    validation = [r for r in kept if r.caption in held_out]
    report: dict[str, Any] = {
        "source": data.source,
        "read": read,
        "kept": len(kept),
        "dropped": _by_reason(rejections),
        "train": _count(train),
        "validation": _count(validation),
    }
    report |= _also(found, kept)
    if len(train) < minimum or not validation:
        raise UserError(_too_few(data, report, minimum, rejections, found.passed_over))
    with atomic_folder(out) as folder:
        write_records(folder / "train.jsonl", train)
        write_records(folder / "validation.jsonl", validation)
        write_json(folder / "report.json", report)
        if rejections:
            write_rejections(folder, data, rejections)
    return report


def choose_validation(captions: set[str], share: float, seed: int) -> set[str]:
    """Returns about `share` of the captions, at least one and never all; none where there are fewer than two.

    Apart from these bounds each caption is judged by its own hash: a data set that grows moves no caption from one
    side to the other. Captions that differ in case only fall on the same side.
    """

    def lot(caption: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}/{caption.casefold()}".encode()).digest()[:8], "big") / 2**64

    lots = {caption: lot(caption) for caption in captions}
    levels = sorted(set(lots.values()))
    if len(levels) < 2:
        return set()
    limit = min(max(share, levels[1]), levels[-1])  # the lowest is always chosen, the highest never
    return {caption for caption, value in lots.items() if value < limit}


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
    for part in ("train", "validation"):
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
            f"{data.path}: all {report['kept']} {counted} that are left have one caption; data.validation holds out "
            "whole captions, so there must be two at least"
        )
    held_out = report["validation"]["pictures"]
    left = (
        f"{report['train']['pictures']} training {counted} are left and one batch needs {minimum}; "
        f"read {report['read']}, held out for validation {held_out}"
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
