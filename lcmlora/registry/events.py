"""What happened to a registered version, kept as its tags: `event.<time>` holds JSON."""

from __future__ import annotations

import datetime
import getpass
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from lcmlora.io.parsing import Malformed, parse_json

_TAG = "event."
_KINDS = {"action": str, "who": str, "reason": str, "alias": str, "former": int, "override": bool}  # in a tag
_LARGEST = 1 << 31  # of MLflow's version numbers


@dataclass(frozen=True)
class Event:
    """Something that happened to a version."""

    time: str  # ISO 8601 with microseconds, UTC
    action: str  # registered, passed, rejected, promoted, rolled back
    version: int
    who: str
    reason: str | None = None
    alias: str | None = None  # that the version got
    former: int | None = None  # the version that had the alias before
    override: bool = False  # against the gate


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def user() -> str:
    """Returns the name of the user that this process runs as; in a container he often has none, but a number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def tag(
    action: str,
    *,
    reason: str | None = None,
    who: str | None = None,
    alias: str | None = None,
    former: int | None = None,
    override: bool = False,
) -> tuple[str, str]:
    """Returns name and value of the tag of an event that happens now.

    Args:
        who: by default the user that this process runs as.
    """
    event = Event(now(), action, 0, who or user(), reason, alias, former, override)
    said = {key: value for key, value in asdict(event).items() if value and key not in ("time", "version")}
    # MLflow's names of tags have no colon.
    return f"{_TAG}{event.time.replace(':', '').replace('-', '')}", json.dumps(said, sort_keys=True)


def read(version: int, tags: Mapping[str, str]) -> list[Event]:
    """Returns the events among the tags of a version, the oldest first; those that others wrote are passed over."""
    found = (_event(version, name, value) for name, value in sorted(tags.items()) if name.startswith(_TAG))
    return [event for event in found if event is not None]


def foreign(tags: Mapping[str, str]) -> list[str]:
    """Returns the names of the tags that are called like events and are none of ours."""
    return sorted(name for name, value in tags.items() if name.startswith(_TAG) and _event(0, name, value) is None)


def _event(version: int, name: str, value: object) -> Event | None:
    """Returns the event of a tag, None where it is not one that `tag` wrote: MLflow takes any from anybody."""
    time = _time(name)
    if time is None or not isinstance(value, str):
        return None
    try:
        said = parse_json(value)
    except Malformed:
        return None
    if not isinstance(said, dict) or not {"action", "who"} <= said.keys() <= _KINDS.keys():
        return None
    if not all(type(each) is _KINDS[key] for key, each in said.items()):
        return None
    former = said.get("former", 1)
    return Event(time=time, version=version, **said) if 0 < former < _LARGEST else None


def champions(events: Iterable[Event], alias: str) -> list[int]:
    """Returns the line of versions that had the alias, the present one last, without what was rolled back.

    Args:
        events: of all versions, the oldest first.
    """
    line: list[int] = []
    for event in (event for event in events if event.alias == alias):
        # The former one may have been made champion elsewhere, in MLflow's own pages.
        if event.former is not None and event.former not in line[-1:]:
            line.append(event.former)
        if event.action == "rolled back" and event.version in line:
            del line[line.index(event.version) + 1 :]
        elif line[-1:] != [event.version]:
            line.append(event.version)
    return line


def _time(name: str) -> str | None:
    """Returns the time in a tag's name, None where there is none."""
    digits = name.removeprefix(_TAG)
    if not re.fullmatch(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z", digits):  # 20261125T195433.123456Z
        return None
    time = f"{digits[:4]}-{digits[4:6]}-{digits[6:11]}:{digits[11:13]}:{digits[13:]}"
    try:
        datetime.datetime.fromisoformat(time)
    except ValueError:
        return None
    return time
