"""The standing of every model, from MLflow, DVC and Prefect: champion, last run, stale stages, next run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from lcmlora.config import Config
from lcmlora.flows import has_server, name_of
from lcmlora.flows.retrain import prepare_of, stages_of
from lcmlora.flows.standing import server as server_side
from lcmlora.flows.standing.server import Run, runs_since
from lcmlora.registry.listing import current
from lcmlora.registry.listing.current import Current
from lcmlora.registry.lookup import Version
from lcmlora.tasks import dvc
from lcmlora.tasks.processes import Processes
from lcmlora.tasks.workspace.state import Running, Workspace

__all__ = ["FIGURES", "Run", "Running", "Standing", "has_server", "runs_since", "standings"]

FIGURES = ("excess", "retrieval")


@dataclass(frozen=True)
class Standing:
    """The standing of one model."""

    model: str
    champion: str | None  # lcm-lora-emoji/3
    since: str | None  # ISO 8601, UTC
    figures: dict[str, float | None]  # excess and retrieval of the champion at the gate's steps
    newest: str | None
    newest_gate: str | None  # passed or rejected, and what a person has said
    last_run: Run | None
    stale: list[str]  # stages
    due: str | None  # the next scheduled run, ISO 8601, UTC
    reasons: dict[str, list[str]] = field(default_factory=dict)  # of each stale stage
    running: list[Running] = field(default_factory=list)  # stages, wherever the server or this folder knows of them
    undecided: list[str] = field(default_factory=list)  # stages that are stale or not when what runs now has ended
    failure: Run | None = None  # the last run that came to an end, if that was a failure
    kept_from_running: str | None = None  # such as a schedule that is paused
    unknown: str | None = None  # why it is not known which stages are stale

    @property
    def needs(self) -> list[str]:
        """What a person should know of the model, a line each: what runs, why a run failed, why stages are stale."""
        lines = [f"runs now: {each.line}" for each in self.running]
        lines += [f"known when that has ended: whether {', '.join(self.undecided)} must run"] if self.undecided else []
        if self.failure:
            named = f"{self.failure.end} {self.failure.time} ({self.failure.name})"
            lines += [f"{named}: {line}" for line in (self.failure.message or "no reason is known").splitlines()]
        lines += [f"{name} is stale: {'; '.join(self.reasons[name])}" for name in self.stale if name in self.reasons]
        lines += [f"what is stale is not known: {self.unknown}"] if self.unknown else []
        return lines + ([f"next run: {self.kept_from_running}"] if self.kept_from_running else [])


def standings(settings: Config, *, server: bool) -> list[Standing]:
    """Returns the standing of each model of params.yaml. It changes nothing and waits for nothing that runs.

    Args:
        server: ask Prefect's server for runs and schedules. Otherwise they are None.

    Raises:
        Unavailable: MLflow or Prefect does not answer.
    """
    names = {model: [prepare_of(model, settings), *stages_of(model, settings)] for model in settings.models}
    workspace, unknown = _look(settings, list(dict.fromkeys(name for own in names.values() for name in own)))
    known = server_side.read([*settings.models]) if server else None
    now = datetime.now(UTC)
    registered = current.read(settings.registry, {name_of(model) for model in settings.models})
    found = []
    for model in settings.models:
        champion, newest = registered.get(name_of(model), Current(None, None))
        steps = settings.gate.steps
        due, kept = known.next_run(model, now) if known else (None, None)
        found.append(
            Standing(
                model=model,
                champion=champion.reference if champion else None,
                since=champion.promoted if champion else None,
                figures={key: champion.figure(f"{key}.student_{steps}") if champion else None for key in FIGURES},
                newest=newest.reference if newest else None,
                newest_gate=_standing_of(newest) if newest else None,
                last_run=known.last_run(model) if known else None,
                stale=[name for name in names[model] if name in workspace.reasons],
                due=due,
                reasons={name: workspace.reasons[name] for name in names[model] if name in workspace.reasons},
                undecided=[
                    name
                    for name in names[model]
                    if name in workspace.blocked and name not in {each.stage for each in workspace.running}
                ],
                running=_running(names[model], workspace.running, known.running if known else []),
                failure=known.failure(model) if known else None,
                kept_from_running=kept,
                unknown=unknown,
            )
        )
    return found


def _standing_of(version: Version) -> str:
    """Returns what the gate has said of a version, and a person where one was asked: `passed, awaiting approval`."""
    said = {
        "awaiting": ", awaiting approval",
        "rejected": ", rejected by a person",
        "timed out": ", not approved in time",
    }
    return version.gate + said.get(version.approval or "", "")


def _look(settings: Config, stages: list[str]) -> tuple[Workspace, str | None]:
    """Returns the state of the stages, and why it is not known; the rest of a standing does not depend on it."""
    try:
        with Processes() as processes:
            return dvc.look(stages, processes, settings), None
    except dvc.StageFailed as error:
        return Workspace({}), str(error)


def _running(stages: Sequence[str], here: Sequence[Running], elsewhere: Sequence[Running]) -> list[Running]:
    """Returns what runs of these stages. What this machine knows counts more than what the server does."""
    every = {each.stage: each for each in (*elsewhere, *here)}
    return [every[name] for name in stages if name in every]
