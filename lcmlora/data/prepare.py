"""Stage `prepare`: reads the source, drops what cannot be used, and splits the rest into train, validation and test."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from lcmlora.config import Data, Launch
from lcmlora.data import rejection_advice
from lcmlora.data.preparation import rejected, splitting
from lcmlora.data.preparation.partitions import Digests
from lcmlora.data.preparation.selecting import NEAR_DUPLICATE, Selection
from lcmlora.data.preparation.shards import Finished
from lcmlora.data.preparation.splitting import Levels, Limits, Part
from lcmlora.data.preparation.surveying import Found
from lcmlora.data.reading.candidates import DUPLICATE, Rejection, display_name
from lcmlora.data.rejection_advice import ByReason
from lcmlora.data.sources.source import find
from lcmlora.data.unused_files import Tally, count, no_names, tally
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, discard, locked, temporary_folder, write_json

__all__ = ["DUPLICATE", "NEAR_DUPLICATE", "PARTS", "HeldOut", "Report", "hold_out", "prepare_pictures", "print_report"]

PARTS: tuple[Part, ...] = ("train", "validation", "test")  # each has a list of pictures, such as test.jsonl

_DROPPED = 1000  # rank of rejections that depend on the other pictures or on `data`; after all others
_CHUNK = 1 << 14  # levels in memory
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


def prepare_pictures(
    data: Data, minimum: int, out: Path, *, scratch: Path | None = None, launch: Launch | None = None
) -> Report:
    """Writes train.jsonl, validation.jsonl, test.jsonl and report.json to the folder `out`; returns the report.

    If anything was dropped, rejected.parquet lists all of it, and rejected.html shows examples.

    Args:
        minimum: training pictures without which training cannot start (one batch).
        launch: where pictures are read; by default on all cores of this machine, on eight at most.
        scratch: keeps what was read of each shard, from which a killed run, or one on a set that has grown, goes on.

    Raises:
        UserError: there is nothing to read, or fewer than `minimum` training pictures are left; then `out` is as it
            was before.
    """
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(temporary_folder() if scratch is None else locked(scratch))
        folder = work / "run"
        discard(folder)
        folder.mkdir()
        began = folder.stat().st_mtime  # by the clock of the disk
        finished = Finished(work / "shards")
        found = find(data, finished, folder, launch or Launch())
        report = _merge(found, data, minimum, folder, out)
        discard(folder)
        finished.remove_unused(since=began)
    return report


def _merge(found: Found, data: Data, minimum: int, folder: Path, out: Path) -> Report:
    selection = Selection(found.records, data, folder)
    read = selection.count + found.rejections.count
    if read:
        rejection_advice.check_rejections(data, ByReason(found.rejections), read, found.unused_files)
    captions = _Captions(data, folder)
    noted, cleaned = ByReason(), no_names()
    for record, reason in selection:
        captions.add(record["caption"], kept=not reason)
        if reason:
            found.rejections.add(Rejection(record["key"], reason, record.get("place") or record["key"], rank=_DROPPED))
            continue
        if note := record.get("note"):
            noted.add(Rejection(record["key"], note))
        if "raw_caption" in record:
            count(cleaned, record["key"])
    sizes = captions.split()
    rejections = ByReason(found.rejections)
    report: Report = {
        "source": data.source,
        "read": read,
        "kept": sum(size["pictures"] for size in sizes.values()),
        "dropped": _tallies(rejections),
        "train": sizes["train"],
        "validation": sizes["validation"],
        "test": sizes["test"],
    }
    _add_optional_parts(report, found, _tallies(noted), cleaned)
    if report["train"]["pictures"] < minimum or not report["test"]["pictures"]:
        raise UserError(_too_few_message(data, report, minimum, rejections, found.unused_files))
    with atomic_folder(out) as temporary:
        _write_lists(found.records, captions, temporary)
        write_json(temporary / "report.json", report)
        if rejections.counts:
            rejected.write_table(temporary, found.rejections)
            rejected.write_page(temporary, data, rejections)
    return report


class _Captions:
    """The captions of all records, as their levels (splitting.py): in a file in the order of the records, NaN for one
    that is not kept, and the distinct ones by their digests."""

    def __init__(self, data: Data, folder: Path) -> None:
        self._data = data
        self._levels = (folder / "levels").open("w+b")
        self._distinct = Digests(folder / "captions")
        self._limits = Limits(0.0, 0.0)

    def add(self, caption: str, *, kept: bool) -> None:
        level = splitting.level(caption, self._data.seed) if kept else math.nan
        bits = struct.pack("<d", level)
        self._levels.write(bits)
        if kept:
            self._distinct.add(caption, int.from_bytes(bits, "little"))

    def split(self) -> dict[Part, SplitSize]:
        """Splits the captions; returns what each part has."""

        def kept() -> Iterator[Levels]:
            return (levels[~np.isnan(levels)] for levels in self._chunks())

        self._limits = splitting.find_limits(kept, self._data.validation, self._data.test)
        sizes: dict[Part, SplitSize] = {part: {"pictures": 0, "captions": 0} for part in PARTS}
        for levels in kept():
            for part, number in self._limits.sizes(levels).items():
                sizes[part]["pictures"] += number
        for rows, firsts in self._distinct.groups():
            levels = rows["value"][firsts == np.arange(len(rows))].view(np.float64)
            for part, number in self._limits.sizes(levels).items():
                sizes[part]["captions"] += number
        return sizes

    def parts(self) -> Iterator[Part | None]:
        """Yields the part of each record; None if it is not kept."""
        for levels in self._chunks():
            for level in levels.tolist():
                yield None if math.isnan(level) else self._limits.part(level)

    def _chunks(self) -> Iterator[Levels]:
        self._levels.seek(0)
        while content := self._levels.read(8 * _CHUNK):
            yield np.frombuffer(content, "<f8")


def _write_lists(records: Iterable[bytes], captions: _Captions, folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        lists = {part: stack.enter_context((folder / f"{part}.jsonl").open("wb")) for part in PARTS}
        for line, part in zip(records, captions.parts(), strict=True):
            if part is not None:
                lists[part].write(line)


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
    levels = {caption: splitting.level(caption, seed) for caption in captions}
    limits = splitting.find_limits(lambda: [np.array([*levels.values()])], validation, test)
    held_out: dict[Part, set[str]] = {part: set() for part in PARTS}
    for caption, level in levels.items():
        held_out[limits.part(level)].add(caption)
    return HeldOut(held_out["validation"], held_out["test"])


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


def _add_optional_parts(report: Report, found: Found, noted: dict[str, Tally], cleaned: Tally) -> None:
    """Adds to the report the parts that are left out of it if they are empty."""
    unit = "pictures" if found.of_pictures else "files"
    if found.left_out:
        report["left_out"] = {split: {"of": unit, **names} for split, names in found.left_out.items()}
    if found.unused_files:
        report["passed_over"] = found.unused_files
    if noted:
        report["noted"] = noted
    if cleaned["count"]:
        report["cleaned"] = cleaned


def _tallies(rejections: ByReason) -> dict[str, Tally]:
    return {
        reason: {**tally([each.name for each in rejections.first[reason]]), "count": rejections.counts[reason]}
        for reason in sorted(rejections.counts)
    }


def _too_few_message(
    data: Data, report: Report, minimum: int, rejections: ByReason, unused_files: dict[str, Tally]
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
    dropped = rejections.counts.total()
    if 2 * most > dropped and (most >= report["kept"] or report["train"]["pictures"] + most >= minimum):
        return f"{data.path}: {left}, dropped: {rejection_advice.summary(rejections, unused_files)}"
    reasons = ", ".join(f"{d['count']} {reason}" for reason, d in report["dropped"].items()) or "none"
    return (
        f"{data.path}: {left}, dropped: {reasons}; "
        f"add {unit}, or lower distill.batch or the limits under data in params.yaml"
    )
