"""What is told at the end of a run, and what the `watch` flow tells every quarter of an hour."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Collection, Iterator, Sequence

import httpx
from prefect.exceptions import PrefectException

from lcmlora import masking
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows import has_server, notify
from lcmlora.flows.notices import history, links, troubles
from lcmlora.flows.notices.event import Event
from lcmlora.flows.outcomes import NOT_PUSHED, Outcome
from lcmlora.registry.approval import decisions
from lcmlora.registry.lookup import registered_name


def before_run(settings: Config) -> None:
    """Tells if the disk is nearly full. It raises nothing."""
    if settings.notify.targets:
        with _warning():
            for event in troubles.full_disks(settings):
                notify.send(event, settings)


def after_run(results: Sequence[Outcome], settings: Config) -> None:
    """Tells what a run of `retrain` has brought: failures, and what has happened to versions. It raises nothing."""
    if not settings.notify.targets:
        return
    run = links.flow_run()
    failed: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in results:
        if outcome.errors:
            failed.setdefault(tuple(outcome.errors), []).append(outcome)
        else:
            notify.settle(outcome.model, settings, "failed")
    if not failed:
        notify.settle(None, settings, "failed")
    if not any(outcome.not_pushed for outcome in results):
        notify.settle(None, settings, "stuck")
    for errors, outcomes in failed.items():
        # One message, where a shared stage has failed for all models.
        model = outcomes[0].model if len(outcomes) == 1 else None
        names = "" if model else f"{', '.join(outcome.model for outcome in outcomes)}: "
        notify.send(Event("failed", names + "; ".join(errors), model=model, links=links.of_run(run), run=run), settings)
    for reason in dict.fromkeys(outcome.not_pushed for outcome in results):
        if reason:
            notify.send(Event("stuck", f"{NOT_PUSHED}: {reason}", links=links.of_run(run), run=run), settings)
    with _warning():
        tell_history([outcome.model for outcome in results if outcome.version], settings)


def tell_history(models: Collection[str], settings: Config) -> None:
    """Tells what has happened to the versions of these models and was not told.

    Raises:
        UserError: MLflow cannot be reached.
    """
    if settings.notify.targets and models:
        for event in history.untold(models, settings):
            notify.send(event, settings)


def quarter_hourly(settings: Config) -> None:
    """Ends approvals that nobody gave in time, and tells what nobody else tells. It raises nothing.

    That is: versions that were promoted, rejected or rolled back in whatever way, runs that are stuck or have crashed,
    a disk that is nearly full, and what a receiver has not taken before.
    """
    for model in settings.models:
        if settings.gate.needs_approval(model):
            with _warning():
                decisions.expire(registered_name(model), settings.registry, settings.gate)
    if not settings.notify.targets:
        return
    with _warning():
        notify.resend(settings)
    with _warning():
        tell_history(settings.models, settings)
    with _warning():
        found = [*troubles.full_disks(settings)]
        if has_server():
            now = datetime.datetime.now(datetime.UTC)
            found += [*troubles.stuck_runs(settings, now), *troubles.crashed_runs(settings, now)]
        for event in found:
            notify.send(event, settings)
        for kind in ("stuck", "disk"):
            if kind not in {event.kind for event in found}:
                notify.settle(None, settings, kind, looked=True)


@contextlib.contextmanager
def _warning() -> Iterator[None]:
    """Turns a server that does not answer into a warning: the next round tells what this one could not."""
    try:
        yield
    except (UserError, httpx.HTTPError, PrefectException, OSError) as error:
        notify.warn(f"notify: {masking.text(error)}; the next look tries again")
