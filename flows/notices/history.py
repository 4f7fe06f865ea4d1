"""Telling people what the registry's history has: rejected, promoted, approval needed, whoever and whatever did it.

The history is the record of what has happened, so that nothing of it is lost if a run is killed before it has told it:
the next look at the history does.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator
from pathlib import Path

from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows import name_of
from lcmlora.flows.memory import Memory
from lcmlora.flows.notices import links
from lcmlora.flows.notices.event import Event
from lcmlora.project import Project
from lcmlora.registry import events as records
from lcmlora.registry import lookup
from lcmlora.registry.approval import standing
from lcmlora.registry.listing import recent
from lcmlora.registry.lookup import Version
from lcmlora.releases import bundle
from lcmlora.settings.operation.notify import EventKind

SUBJECT = "history"  # of the memory

_LOOKED = "looked"  # the entry of the last look at all models; no registered model has this name
_FIRST = datetime.timedelta(days=1)  # how far back the first look tells
_FARTHEST = datetime.timedelta(days=31)  # of a memory without that entry
_CLOCK_HOURS = 1  # that the clocks of two machines may differ
_TOLD = 60  # the last events that were told; more than happen in these hours
_PICTURE = "grid.png"  # of a release

_KINDS: dict[str, EventKind] = {
    "rejected": "rejected",
    standing.DECLINED: "rejected",
    standing.TIMED_OUT: "rejected",
    standing.REQUESTED: "approval_needed",
    "promoted": "promoted",
    "rolled back": "promoted",
}


def untold(models: Collection[str], settings: Config) -> Iterator[Event]:
    """Yields what has happened to the versions of these models and was not told, the oldest first.

    What was yielded counts as told when the next one is asked for. With all models of the settings, the next look goes
    no farther back than this one.

    Raises:
        UserError: MLflow cannot be reached.
    """
    began, memory = _now(), Memory(SUBJECT, settings)
    entries, names = memory.read(), {name_of(model): model for model in models}
    # The clock of another machine may be behind, so that its events come late.
    late = datetime.timedelta(hours=_CLOCK_HOURS)
    looked = entries.get(_LOOKED)
    first = datetime.datetime.fromisoformat(looked["at"]) - late if looked else began - _FIRST
    since = {
        name: datetime.datetime.fromisoformat(entries[name]["newest"]) - late if name in entries else first
        for name in names
    }
    begin = max(first if looked else began - _FARTHEST, min(since.values(), default=first))
    for name, record in recent.read(settings.registry, names, begin):
        entry = entries.setdefault(name, {"newest": "", "told": []})
        identity = f"{record.version} {record.time}"
        if record.action not in _KINDS or identity in entry["told"]:
            continue
        if datetime.datetime.fromisoformat(record.time) <= since[name]:
            continue
        version = lookup.resolve(f"models:/{name}/{record.version}", settings.registry)
        yield _event(names[name], record, version, settings)
        entry |= {"newest": max(record.time, entry["newest"]), "told": [*entry["told"], identity][-_TOLD:]}
        memory.write(name, entry)
    if names.keys() >= {name_of(model) for model in settings.models}:
        memory.write(_LOOKED, {"at": began.isoformat()})


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _event(model: str, record: records.Event, version: Version, settings: Config) -> Event:
    kind, said = _KINDS[record.action], f": {record.reason}" if record.reason else ""
    reason = {
        "approval_needed": f"{version.reference} passed the gate and waits for a person; "
        f"`lcmlora approve {version.reference}` makes it {settings.registry.alias}, "
        f"`lcmlora reject {version.reference} --reason ...` does not. "
        f"It counts as rejected after {settings.gate.approval_days:g} days",
        "promoted": f"{version.reference} is {settings.registry.alias} now, {record.action} by {record.who}{said}",
        "rejected": f"{version.reference}: {record.action}{said}",
    }[kind]
    if record.action == standing.DECLINED:
        reason = f"{version.reference}: {record.action} by {record.who}{said}"
    return Event(
        kind,
        reason,
        model=model,
        version=version.reference,
        figures=figures(version, settings),
        links=links.of_version(version, settings),
        run=links.flow_run(),
        pictures=_pictures(model, version),
        occurrence=f"{version.reference} {record.time} {record.action}",
        happened=datetime.datetime.fromisoformat(record.time).isoformat(timespec="seconds"),
    )


def figures(version: Version, settings: Config) -> dict[str, float | str]:
    """Returns the main figures of a version, beside those of the champion where that is another one."""
    found: dict[str, float | str] = {}
    champion = lookup.champion(version.name.removeprefix(lookup.PREFIX), settings.registry)
    for key in ("excess", "retrieval"):
        steps = settings.gate.steps
        for each in (version, champion):
            value = each.figure(f"{key}.student_{steps}") if each else None
            if each is not None and value is not None and (each is version or each.version != version.version):
                suffix = "" if each is version else f" of {each.reference}, the {settings.registry.alias}"
                found[f"{key} at {steps} steps{suffix}"] = value
    return found


def _pictures(model: str, version: Version) -> tuple[Path, ...]:
    """Returns the contact sheet of a version whose release is in this project's folder."""
    folder = Project().release(model)
    try:
        here = bundle.digest(folder) == version.sha256
    except (OSError, UserError):  # no release, or half of one
        return ()
    return (folder / _PICTURE,) if here else ()
