"""The record of something that people want to be told of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lcmlora.settings.operation.notify import EventKind


@dataclass(frozen=True)
class Event:
    """Something that people want to be told of.

    `notify.send` masks secrets in every text of it.
    """

    kind: EventKind
    reason: str  # in one or a few lines: what happened and, if something must be done, what
    model: str | None = None  # None where it concerns no single model
    figures: Mapping[str, float | str] = field(default_factory=dict)  # what a message shows as a table
    links: Mapping[str, str] = field(default_factory=dict)  # addresses by their titles, such as "MLflow run"
    run: str | None = None  # id of Prefect's run
    version: str | None = None  # lcm-lora-emoji/3
    pictures: tuple[Path, ...] = ()  # files that an e-mail has as attachments
    looked: bool = False  # found by a look from outside, which also finds that it is over; not told by a run of itself
    # What tells this event from all others, where it happened but once, such as an entry of a version's history. It is
    # told even if an event that reads the same was told before.
    occurrence: str | None = None
    happened: str | None = None  # when; ISO 8601, UTC, to the second. None: now
