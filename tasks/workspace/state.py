"""The state of a project's folder as records, and in words: stale stages with their reasons, and what runs now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lcmlora.io.parsing import JsonObject, as_object
from lcmlora.io.terminal import shown

_VALUE = 60  # characters of a value
_MOST = 6  # reasons that are shown of one stage
_MISSING = object()
_INPUT = {"modified": "has changed", "deleted": "is missing", "new": "is a new input"}
_OUTPUT = {
    "modified": "was changed after the stage ran",
    "deleted": "is missing",
    "new": "was not recorded",
    "not in cache": "is not in DVC's cache",
}


@dataclass(frozen=True)
class Running:
    """A stage that runs at the moment."""

    stage: str
    since: str | None  # ISO 8601, UTC
    process: int | None = None  # of DVC on this machine
    command: str | None = None  # dvc repro distill@emoji
    run: str | None = None  # name of the Prefect run

    @property
    def line(self) -> str:
        """What runs, since when, and by which run and process, in one line."""
        by = [f"run {self.run}"] if self.run else []
        by += [f"process {self.process}"] if self.process else []
        by += [self.command] if self.command and not self.run else []
        since = f" since {self.since}" if self.since else ""
        return shown(f"{self.stage}{since}" + (f" ({', '.join(by)})" if by else ""), None)


@dataclass(frozen=True)
class Workspace:
    """Which stages are stale, and what runs."""

    reasons: dict[str, list[str]]  # of each stale stage, why
    blocked: dict[str, list[int]] = field(default_factory=dict)  # stages whose files these processes write now
    running: list[Running] = field(default_factory=list)

    @classmethod
    def of(cls, answer: object) -> Workspace:
        """Makes it of what look.py has printed. Raises UserError, KeyError or TypeError for anything else."""
        plain = as_object(answer, "the state of the stages")
        stages = as_object(plain["stages"], "stages")
        return cls(
            {name: reasons(found["changes"]) for name, found in stages.items() if found["changes"]},
            {name: found["blocked"] for name, found in stages.items() if found.get("blocked")},
            [Running(**each) for each in plain["running"]],
        )


def reasons(changes: list[JsonObject]) -> list[str]:
    """Returns why a stage is stale, a line for each reason, such as `distill.steps 700 -> 900`."""
    found = [line for change in changes for line in _lines(change)]
    return found if len(found) <= _MOST else [*found[:_MOST], f"{len(found) - _MOST} more changes"]


def _lines(change: JsonObject) -> Iterator[str]:
    match change["what"]:
        case "new":
            yield "has not run yet"
        case "undefined":
            yield "is not in dvc.yaml yet"
        case "command":
            yield "its command in dvc.yaml has changed"
        case "input":
            yield f"{change['path']} {_INPUT.get(change['how'], 'is ' + change['how'])}"
        case "output":
            yield f"{change['path']} {_OUTPUT.get(change['how'], 'is ' + change['how'])}"
        case "parameter":
            yield from _parameter(change)


def _parameter(change: JsonObject) -> Iterator[str]:
    """Yields the settings that differ in an entry of resolved.yaml, or of another file of parameters."""
    old, new = change.get("old", _MISSING), change.get("new", _MISSING)
    of_stage = change["file"] == "resolved.yaml"
    for keys, before, after in differences(old, new):
        if of_stage and keys[:1] == ("algorithms",) and len(keys) == 2:
            yield f"version of stage {keys[1]} {_value(before)} -> {_value(after)}"
        else:
            name = ".".join(keys) if of_stage and keys else ".".join((f"{change['file']}: {change['key']}", *keys))
            yield f"{name} {_value(before)} -> {_value(after)}"


def differences(old: Any, new: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yields the keys at which two trees differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key, _MISSING), new.get(key, _MISSING), (*keys, str(key)))
    elif old != new:
        yield keys, old, new


def _value(value: Any) -> str:
    return "not set" if value is _MISSING else "null" if value is None else shown(value, _VALUE)
