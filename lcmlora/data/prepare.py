"""Stage `prepare`: which pictures are kept, which captions are held out, and a report of all that was dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lcmlora.config import Data
from lcmlora.data.duplicates import Looks
from lcmlora.data.rejections import write as write_rejections
from lcmlora.data.sources import Record, Rejection, find, write_records
from lcmlora.errors import UserError
from lcmlora.files import atomic_folder, write_json

DUPLICATE = "same bytes as another picture"
ALIKE = "looks like another picture (data.near_duplicates)"

_OFFENDERS = 10  # names listed for each reason


def prepare(data: Data, minimum: int, out: Path) -> dict[str, Any]:
    """Writes train.jsonl, validation.jsonl and report.json to the folder `out`; returns the report.

    Where something was dropped, rejected.parquet has it all, and rejected.html shows examples.

    Args:
        minimum: training pictures without which training cannot start (one batch).

    Raises:
        UserError: nothing to read, or less than `minimum` left; then `out` is as it was before.
    """
    found, rejections = find(data)
    read = len(found) + len(rejections)
    kept = []
    seen: set[str] = set()
    looks = Looks(data.near_duplicates or 0)
    for record in found:
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
    report = {
        "source": data.source,
        "read": read,
        "kept": len(kept),
        "dropped": _by_reason(rejections),
        "train": _count(train),
        "validation": _count(validation),
    }
    if len(train) < minimum or not validation:
        raise UserError(_too_few(data, report, minimum))
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

    counted = "prompts" if report["source"] == "prompts" else "pictures"
    table = Table(counted, "count", "first of them", title=f"data: {report['source']}", title_justify="left")
    table.add_row("read", str(report["read"]), "")
    for reason, dropped in report["dropped"].items():
        names = ", ".join(dropped["first"][:3]) + (", ..." if dropped["count"] > 3 else "")
        table.add_row(f"dropped: {escape(reason)}", str(dropped["count"]), escape(names))
    for part in ("train", "validation"):
        table.add_row(part, str(report[part]["pictures"]), f"{report[part]['captions']} captions")
    Console(stderr=True).print(table)


def _unwanted(record: Record, data: Data) -> str:
    if data.source == "prompts":
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


def _too_few(data: Data, report: dict[str, Any], minimum: int) -> str:
    if report["train"]["pictures"] >= minimum:
        return (
            f"{data.path}: all {report['kept']} pictures that are left have one caption; data.validation holds out "
            "whole captions, so there must be two at least"
        )
    reasons = ", ".join(f"{d['count']} {reason}" for reason, d in report["dropped"].items()) or "none"
    return (
        f"{data.path}: {report['train']['pictures']} training pictures are left and one batch needs {minimum}; "
        f"read {report['read']}, held out for validation {report['validation']['pictures']}, dropped: {reasons}; "
        "add pictures, or lower distill.batch or the limits under data in params.yaml"
    )
