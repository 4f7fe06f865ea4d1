"""Where a version stands on its way through approval, as its history has it: nothing else is kept."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lcmlora.registry.events import Event

# Actions in the history. `rejected` is the gate's own word.
REQUESTED, APPROVED, DECLINED = "approval requested", "approved", "approval rejected"
TIMED_OUT, SUPERSEDED = "approval timed out", "approval superseded"

AWAITING = "awaiting"
State = Literal["awaiting", "approved", "rejected", "timed out", "superseded"]
REFUSED: tuple[State, ...] = ("rejected", "timed out")  # which no run promotes


@dataclass(frozen=True)
class Standing:
    """What was decided on a version, by whom and why; or since when it waits."""

    state: State
    time: str  # ISO 8601, UTC
    who: str
    reason: str | None

    @property
    def text(self) -> str:
        """Such as `approval rejected by ada on 2026-11-29: blurred hands`."""
        said = {
            "awaiting": f"awaits approval since {self.time[:10]}",
            "approved": f"approved by {self.who} on {self.time[:10]}",
            "rejected": f"approval rejected by {self.who} on {self.time[:10]}",
            "timed out": f"approval timed out on {self.time[:10]}",
            "superseded": f"approval superseded on {self.time[:10]}",
        }[self.state]
        return f"{said}: {self.reason}" if self.reason and self.state != AWAITING else said

    def deadline(self, days: float) -> datetime.datetime:
        """Returns when waiting ends."""
        return datetime.datetime.fromisoformat(self.time) + datetime.timedelta(days=days)


def standing(events: Iterable[Event], alias: str) -> Standing | None:
    """Returns where a version stands, None where nobody has asked for approval or decided.

    The first decision holds: what comes after it at the same time from elsewhere changes nothing. Giving the alias to a
    version that waits or was refused approves it, since only a person does so.

    Args:
        events: of one version, the oldest first.
    """
    found: Standing | None = None
    for event in events:
        state = _next(found.state if found else None, event, alias)
        if state is not None:
            found = Standing(state, event.time, event.who, event.reason)
    return found


def _next(state: State | None, event: Event, alias: str) -> State | None:
    """Returns the state that an event leads to, None where it changes nothing."""
    if event.alias == alias:
        return "approved" if state not in (None, "approved") else None
    if event.action == REQUESTED:
        return "awaiting" if state in (None, "superseded") else None
    if event.action == APPROVED:
        return "approved" if state in (None, "awaiting") else None
    if event.action == DECLINED:
        return "rejected" if state in (None, "awaiting", "superseded") else None
    if state == "awaiting":
        return {TIMED_OUT: "timed out", SUPERSEDED: "superseded"}.get(event.action)  # type: ignore[return-value]
    return None
