"""Telling people what has happened: one record of an event, and one function that sends it to all who asked for it.

A message is kept before it is sent, and forgotten when everybody has it. So none is lost if the process is killed, or a
receiver is down: the `watch` flow sends it again. A receiver may get it twice, with the same id.
"""

from __future__ import annotations

import httpx
from prefect.exceptions import PrefectException

from lcmlora import masking
from lcmlora.config import Config
from lcmlora.flows.notices import outbox, repeats
from lcmlora.flows.notices.event import Event
from lcmlora.flows.notices.message import Message
from lcmlora.settings.operation.notify import EventKind
from lcmlora.tasks.output import log_line

__all__ = ["Event", "resend", "send", "settle", "test", "warn"]


def send(event: Event, settings: Config) -> None:
    """Tells all targets of `notify` that asked for this kind of event and model.

    What was told within `notify.repeat_days` is counted and not told again. Telling takes `notify.seconds` at most and
    raises nothing: what could not be delivered is logged, kept, and tried again by the `watch` flow. Without targets
    nothing happens.
    """
    targets = _concerned(event, settings)
    if not targets:
        return
    try:
        counted = repeats.count(event, settings)
        message = Message.of(event, counted.times, counted.since)
        if not counted.told:
            outbox.put(message, targets, settings)
        counted.keep(settings)
        if counted.told:
            log_line(f"notify: {event.kind}: told before, {counted.times} times since {counted.since}")
            return
    except (httpx.HTTPError, PrefectException, OSError) as error:
        # People are told all the same; what cannot be kept is whether they were.
        warn(f"notify: Prefect does not keep what is told: {masking.text(error)}")
        outbox.send(Message.of(event), targets, settings, warn, kept=False)
        return
    taken = outbox.send(message, targets, settings, warn)
    try:
        outbox.take(message, taken, settings)
    except (httpx.HTTPError, PrefectException, OSError) as error:
        warn(f"notify: Prefect does not keep what was told, so that it is told again: {masking.text(error)}")


def settle(model: str | None, settings: Config, *kinds: EventKind, looked: bool = False) -> None:
    """Notes that troubles of these kinds are over, so that they are told at once if they happen again.

    Args:
        looked: those that were found by looks from outside, not those that runs have told of themselves.
    """
    if settings.notify.targets:
        try:
            repeats.settle(kinds, model, settings, looked=looked)
        except (httpx.HTTPError, PrefectException, OSError) as error:
            warn(f"notify: Prefect does not answer: {masking.text(error)}")


def resend(settings: Config) -> int:
    """Sends what still waits for a receiver, and returns how much was delivered.

    Raises:
        httpx.HTTPError: Prefect does not answer.
    """
    repeats.forget_old(settings)
    return outbox.retry(settings, warn)


def test(targets: list[str], settings: Config) -> list[str]:
    """Sends a message that nothing has happened to these targets, and returns those that have taken it."""
    return outbox.send(Message.test(), targets, settings, warn, kept=False)


def _concerned(event: Event, settings: Config) -> list[str]:
    return [
        name
        for name, target in settings.notify.targets.items()
        if event.kind in target.events and (not target.models or event.model in (None, *target.models))
    ]


def warn(line: str) -> None:
    """Writes a line to the present run's log as a warning, and unless a worker has started it to standard error."""
    log_line(f"warning: {line}")
