"""Telling the same trouble once: what was told, how often it has happened since, and when it was over."""

from __future__ import annotations

import datetime
import hashlib
import re
from typing import NamedTuple

from lcmlora.config import Config
from lcmlora.flows.memory import Entry, Memory
from lcmlora.flows.notices.event import Event

SUBJECT = "told"  # of the memory

_RUNS = 100  # the last runs of an event that are known: more than `watch` has in a day
_KEPT_DAYS = 60  # after an event has happened last


class Count(NamedTuple):
    """How often an event has happened since it was told first, and whether it was told and need not be told now."""

    times: int
    since: str  # ISO 8601
    told: bool
    key: str  # of the entry that keeps the count
    entry: Entry | None  # None if nothing is to be kept

    def keep(self, settings: Config) -> None:
        """Keeps the count. What is told now is in the outbox before, so that nothing is lost in between."""
        if self.entry is not None:
            Memory(SUBJECT, settings).write(self.key, self.entry)


def count(event: Event, settings: Config) -> Count:
    """Returns how often an event has happened with this one, and whether people know of it already.

    Two events are the same if kind, model, version and reason are, numbers in the reason aside: a failure is told once,
    also if it fails at another step the next night. An event of a run that was counted is not counted again.
    """
    now = _now()
    if event.occurrence is not None:
        return Count(1, event.happened or now, False, "", None)
    key = f"{_start(event.kind, event.model, event.looked)}{_fingerprint(event)}"
    entry = Memory(SUBJECT, settings).read().get(key) or {"times": 0, "since": now, "told": "", "runs": []}
    if event.run is not None and event.run in entry["runs"]:
        return Count(entry["times"], entry["since"], True, key, None)
    oldest = _parsed(now) - datetime.timedelta(days=settings.notify.repeat_days)
    told = _parsed(entry["told"]) > oldest
    runs = [*entry["runs"], *([event.run] if event.run else [])][-_RUNS:]
    kept = {"times": entry["times"] + 1, "since": entry["since"], "last": now, "runs": runs}
    return Count(kept["times"], kept["since"], told, key, kept | {"told": entry["told"] if told else now})


def has_told_its_failure(run: str, entries: dict[str, Entry]) -> bool:
    """Returns whether a run has failed and told it itself, by the entries of the memory."""
    return any(run in entry.get("runs", ()) for key, entry in entries.items() if key.startswith("failed "))


def settle(kinds: tuple[str, ...], model: str | None, settings: Config, *, looked: bool = False) -> None:
    """Forgets troubles that are over: if they happen again, they are told at once.

    Args:
        looked: those that were found by looks, not those that runs have told of themselves.
    """
    memory = Memory(SUBJECT, settings)
    for key in memory.read():
        if key.startswith(tuple(_start(kind, model, looked) for kind in kinds)):
            memory.forget(key)


def forget_old(settings: Config) -> None:
    """Forgets troubles that have not happened for two months, such as those of a model that is gone."""
    memory, now = Memory(SUBJECT, settings), _parsed(_now())
    for key, entry in memory.read().items():
        if _parsed(entry.get("last", "")) < now - datetime.timedelta(days=_KEPT_DAYS):
            memory.forget(key)


def _start(kind: str, model: str | None, looked: bool) -> str:
    return f"{kind} {model or ''} {'looked' if looked else 'run'} "


def _fingerprint(event: Event) -> str:
    reason = re.sub(r"[0-9a-f]*[0-9][0-9a-f.:-]*", "#", event.reason)
    return hashlib.sha256(f"{event.version} {reason}".encode()).hexdigest()[:16]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _parsed(time: object) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(str(time))
    except ValueError:  # somebody has changed it on Prefect's pages
        return datetime.datetime.fromtimestamp(0, datetime.UTC)
