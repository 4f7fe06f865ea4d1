"""What an upgrade would do, in lines for a terminal."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from lcmlora.io.terminal import shown
from lcmlora.projects.record import own_version
from lcmlora.projects.upgrade.costs import Cost
from lcmlora.projects.upgrade.plan import BESIDE, FileChange, Upgrade
from lcmlora.projects.upgrade.staleness import Outlook, Setting, Stale

_DIFF_LINES = 60  # of a file; the whole difference is between the file and the one beside it


def lines(upgrade: Upgrade, costs: Mapping[str, Cost]) -> Iterator[str]:
    """Yields the lines of the report. Nothing is said of what stays as it is, but for files that were edited."""
    yield f"the project is of lcmlora {upgrade.made_by}, and this is {own_version()}"
    if upgrade.converted:
        yield "settings"
        for each in sorted(upgrade.converted, key=lambda converted: converted.line):
            yield f"  line {each.line}: {each.key} {each.told}"
    told = [line for change in upgrade.files for line in _file(change)]
    if told:
        yield "files"
        yield from told
    if upgrade.unused:
        yield f"no longer needed, yours to delete: {', '.join(map(shown, upgrade.unused))}"
    yield from _stale(upgrade.outlook, costs)


def _file(change: FileChange) -> Iterator[str]:
    path = shown(change.path)
    if change.action == "beside":
        yield f"  {path}: has changes of yours that contradict the new text, which goes to {path}{BESIDE}"
        yield from (f"    {line}" for line in _difference(change))
    elif change.is_change:
        yield f"  {path}: is " + {"write": "written", "merge": "written; your changes stay"}[change.action]
    elif change.belongs_to_person:
        yield f"  {path}: is yours and stays as it is" if change.before is not None else f"  {path}: stays deleted"


def _difference(change: FileChange) -> list[str]:
    """Returns how the new text differs from the edited one."""
    found = list(
        difflib.unified_diff(
            (change.before or "").splitlines(),
            change.text.splitlines(),
            change.path,
            change.path + BESIDE,
            n=1,
            lineterm="",
        )
    )
    more = [f"... and {len(found) - _DIFF_LINES} more lines"] if len(found) > _DIFF_LINES else []
    return [*found[:_DIFF_LINES], *more]


def _stale(outlook: Outlook, costs: Mapping[str, Cost]) -> Iterator[str]:
    if not outlook.stale:
        yield "No stage becomes stale." if not outlook.never_run else "No stage that has run becomes stale."
    else:
        yield "stages that become stale, and why"
    for model, found in groupby(sorted(outlook.stale, key=lambda each: each.run.model or ""), lambda s: s.run.model):
        yield f"  {model or 'all models'}"
        for stage in found:
            yield f"    {stage.name}: {_duration(costs[stage.name])}"
            yield from (f"      {line}" for line in _reasons(stage))
    if outlook.stale:
        yield f"in all {_sum(costs)}"
    if outlook.new:
        yield f"stages that are new: {', '.join(map(shown, outlook.new))}"
    for model in outlook.never_run:
        yield f"{shown(model)}: no stage has run yet"


def _reasons(stage: Stale) -> Iterator[str]:
    for version in stage.versions:
        release = f" ({version.release})" if version.release else ""
        yield f"{version.stage} version {version.version}{release}: {version.change}"
    yield from map(_setting, stage.settings)
    yield from map(shown, stage.others)
    if stage.after:
        yield f"reads what {', '.join(map(shown, stage.after))} will make"


def _setting(setting: Setting) -> str:
    origin = f" ({setting.origin})" if setting.origin else ""
    return f"{shown(setting.key)}: {_value(setting.old)} -> {_value(setting.new)}{origin}"


def _value(value: Any) -> str:
    return "none" if value is None else shown(json.dumps(value, ensure_ascii=False), 100)


def _duration(cost: Cost) -> str:
    return f"unknown time ({cost.source})" if cost.seconds is None else f"{_hours(cost.seconds)} ({cost.source})"


def _sum(costs: Mapping[str, Cost]) -> str:
    known = [cost.seconds for cost in costs.values() if cost.seconds is not None]
    unknown = len(costs) - len(known)
    if not known:
        return "unknown time"
    return f"about {_hours(sum(known))}" + (f", and {unknown} of unknown time" if unknown else "")


def _hours(seconds: float) -> str:
    """Returns a duration in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
