"""The standing of every model, from MLflow, DVC and Prefect: champion, last run, stale stages, next run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from lcmlora import registry
from lcmlora.config import Config
from lcmlora.errors import Unavailable
from lcmlora.flows import credentials, has_server, name_of
from lcmlora.flows.retrain import prepare_of, stages_of
from lcmlora.registry.lookup import Version
from lcmlora.tasks import dvc
from lcmlora.tasks.processes import Processes

__all__ = ["FIGURES", "Run", "Standing", "has_server", "runs_since", "standings"]

_PAGE = 200  # runs; Prefect returns no more in one answer


@dataclass(frozen=True)
class Run:
    """A run of the `retrain` flow."""

    end: str  # the flow's state: Promoted, UpToDate, Failed, Running, ...
    time: str  # ISO 8601, UTC
    message: str | None
    name: str


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


def standings(settings: Config, *, server: bool) -> list[Standing]:
    """Returns the standing of each model of params.yaml.

    Args:
        server: ask Prefect's server for runs and schedules. Otherwise they are None.

    Raises:
        Unavailable: MLflow or Prefect does not answer.
        StageFailed: DVC fails.
    """
    names = {model: [prepare_of(model, settings), *stages_of(model, settings)] for model in settings.models}
    with Processes() as processes:
        dvc.resolve.fn(processes)
        due = dvc.stale.fn(list(dict.fromkeys(name for own in names.values() for name in own)), processes)
    past, coming = _runs() if server else ([], [])
    versions: dict[str, list[Version]] = {}
    for version in registry.versions(settings.registry):
        versions.setdefault(version.name, []).append(version)
    found = []
    for model in settings.models:
        own = versions.get(name_of(model), [])
        champion = next((v for v in own if settings.registry.alias in v.aliases), None)
        steps = settings.gate.steps
        figures = {key: champion.figure(f"{key}.student_{steps}") if champion else None for key in FIGURES}
        found.append(
            Standing(
                model=model,
                champion=champion.reference if champion else None,
                since=champion.promoted if champion else None,
                figures=figures,
                newest=own[0].reference if own else None,
                newest_gate=_standing_of(own[0]) if own else None,
                last_run=next((_run(run) for run in past if _concerns(run, model)), None),
                stale=[name for name in names[model] if name in due],
                due=next((_time(run.expected_start_time) for run in coming if _concerns(run, model)), None),
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


FIGURES = ("excess", "retrieval")


def runs_since(began: datetime) -> list[Run]:
    """Returns the runs of the `retrain` flow that started since then, the newest first.

    Raises:
        Unavailable: Prefect does not answer.
    """
    with _Client() as client:
        started = FlowRunFilter(start_time=FlowRunFilterStartTime.model_validate({"after_": began}))
        found = client.read_flow_runs(flow_filter=_RETRAIN, flow_run_filter=started, sort=_NEWEST, limit=_PAGE)
    return [_run(run) for run in found]


_RETRAIN = FlowFilter(name=FlowFilterName(any_=["retrain"]))
_NEWEST = FlowRunSort.START_TIME_DESC


def _runs() -> tuple[list[FlowRun], list[FlowRun]]:
    """Returns the runs that have started, the newest first, and the scheduled ones, the next first."""
    scheduled = FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])
    started = FlowRunFilterStateType(not_any_=[StateType.SCHEDULED, StateType.PENDING])
    with _Client() as client:
        past, coming = (
            client.read_flow_runs(
                flow_filter=_RETRAIN,
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=kind)),
                sort=sort,
                limit=_PAGE,
            )
            for kind, sort in ((started, _NEWEST), (scheduled, FlowRunSort.EXPECTED_START_TIME_ASC))
        )
    return past, coming


class _Client:
    """A client of the configured server in a `with` block. If the server does not answer, the error is one line."""

    def __enter__(self) -> SyncPrefectClient:
        self._client = get_client(sync_client=True)
        return self._client.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        import httpx

        self._client.__exit__(kind, error, at)
        api = str(os.environ.get("PREFECT_API_URL"))
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise credentials.missing_password(api) from error
        if isinstance(error, httpx.HTTPError):
            raise Unavailable(f"Prefect at {api}: {error}") from error


def _concerns(run: FlowRun, model: str) -> bool:
    models = run.parameters.get("models")
    return models is None or model in models


def _run(run: FlowRun) -> Run:
    state = run.state
    return Run(
        end=state.name or state.type.value if state else "Unknown",
        time=_time(run.start_time or run.expected_start_time) or "",
        message=state.message if state else None,
        name=run.name,
    )


def _time(moment: datetime | None) -> str | None:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None
