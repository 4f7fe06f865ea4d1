"""The history of a registered version, kept in its tags: the tag `event.<time>` has one event as JSON.

The tag `last_event` has the day of the last one, by which the versions are found that something happened to.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lcmlora.io.parsing import Malformed, parse_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

LAST = "last_event"  # tag of a version: 2026-11-29, UTC

_TAG = "event."
_TYPES = {"action": str, "who": str, "reason": str, "alias": str, "former": int, "override": bool}  # in a tag
_LARGEST_VERSION = 1 << 31  # of MLflow


@dataclass(frozen=True)
class Event:
    """An event in a version's history."""

    time: str  # ISO 8601 with microseconds, UTC
    action: str  # registered, passed, rejected, promoted, rolled back
    version: int
    who: str
    reason: str | None = None
    alias: str | None = None  # the alias that was given to the version
    former: int | None = None  # the version that had the alias before
    override: bool = False  # promoted against the gate


def now() -> str:
    """Returns the present time, ISO 8601 with microseconds, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def user() -> str:
    """Returns the name of the user that this process runs as, or `uid NUMBER` for a user without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def event_tag(
    action: str,
    *,
    reason: str | None = None,
    who: str | None = None,
    alias: str | None = None,
    former: int | None = None,
    override: bool = False,
) -> tuple[str, str]:
    """Returns the name and the value of the tag of an event that happens now.

    Args:
        who: the user that this process runs as by default.
    """
    event = Event(now(), action, 0, who or user(), reason, alias, former, override)
    fields = {key: value for key, value in asdict(event).items() if value and key not in ("time", "version")}
    # MLflow allows no colon in the name of a tag.
    return f"{_TAG}{event.time.replace(':', '').replace('-', '')}", json.dumps(fields, sort_keys=True)


def last_tag() -> tuple[str, str]:
    """Returns the name and the value of the tag of a version that something happens to now."""
    return LAST, now()[:10]


def write(
    client: MlflowClient,
    name: str,
    version: int,
    action: str,
    *,
    reason: str | None = None,
    who: str | None = None,
    alias: str | None = None,
    former: int | None = None,
    override: bool = False,
) -> None:
    """Adds an event that happens now to the history of a version.

    Args:
        name: of the registered model; the others as for `event_tag`.
    """
    event = event_tag(action, reason=reason, who=who, alias=alias, former=former, override=override)
    for key, value in (last_tag(), event):  # the day first: a version without its event is looked at in vain at most
        client.set_model_version_tag(name, str(version), key, value)


def of_versions(found: Iterable[ModelVersion]) -> list[Event]:
    """Returns the own events of versions, the oldest first.

    MLflow copies a version with all its tags, so with the events of the original, which are left out.
    """
    every = [event for version in found for event in _of_version(version)]
    return sorted(every, key=lambda event: event.time)


def _of_version(version: ModelVersion) -> list[Event]:
    own = read_events(int(version.version), version.tags)
    if not (version.source or "").startswith("models:/"):
        return own
    copied = datetime.datetime.fromtimestamp(version.creation_timestamp / 1000, datetime.UTC)
    return [event for event in own if datetime.datetime.fromisoformat(event.time) >= copied]


def read_events(version: int, tags: Mapping[str, str]) -> list[Event]:
    """Returns the events among the tags of a version, the oldest first. Tags of other programs are left out."""
    return own_and_foreign(version, tags)[0]


def own_and_foreign(version: int, tags: Mapping[str, str]) -> tuple[list[Event], tuple[str, ...]]:
    """Returns the events of a version, the oldest first, and the names of the tags that look like events and are none.

    Such tags are of other programs, or were written by hand.
    """
    read = {name: _event(version, name, tags[name]) for name in sorted(tags) if name.startswith(_TAG)}
    own = [event for event in read.values() if event is not None]
    return own, tuple(name for name, event in read.items() if event is None)


def _event(version: int, name: str, value: object) -> Event | None:
    """Returns the event of a tag, None where `event_tag` did not write it: anybody can set any tag in MLflow."""
    time = _time(name)
    if time is None or not isinstance(value, str):
        return None
    try:
        fields = parse_json(value)
    except Malformed:
        return None
    if not isinstance(fields, dict) or not {"action", "who"} <= fields.keys() <= _TYPES.keys():
        return None
    if not all(type(each) is _TYPES[key] for key, each in fields.items()):
        return None
    former = fields.get("former", 1)
    return Event(time=time, version=version, **fields) if 0 < former < _LARGEST_VERSION else None


def champions(events: Iterable[Event], alias: str) -> list[int]:
    """Returns the versions that had the alias in their order, the present one last, without those rolled back.

    Args:
        events: those of all versions of a model, the oldest first.
    """
    line: list[int] = []
    seen: set[int] = set()
    for event in (event for event in events if event.alias == alias):
        # Somebody may have given the alias to the former version in MLflow's own pages.
        if event.former is not None and event.former not in line[-1:]:
            line.append(event.former)
        if event.action == "rolled back" and event.version in line:
            del line[line.index(event.version) + 1 :]
        elif line[-1:] != [event.version]:
            if event.action == "rolled back" and event.version not in seen:
                del line[-1:]  # to a version that never was champion, which takes the place of the former one
            line.append(event.version)
        seen.add(event.version)
    return line


def _time(name: str) -> str | None:
    """Returns the time in the name of a tag, None where there is none."""
    digits = name.removeprefix(_TAG)
    if not re.fullmatch(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z", digits):  # 20261125T195433.123456Z
        return None
    time = f"{digits[:4]}-{digits[4:6]}-{digits[6:11]}:{digits[11:13]}:{digits[13:]}"
    try:
        datetime.datetime.fromisoformat(time)
    except ValueError:
        return None
    return time
