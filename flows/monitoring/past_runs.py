"""The runs of the `retrain` flow as metrics need them, read from Prefect's server in a few requests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactCollectionFilter,
    ArtifactCollectionFilterKey,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from lcmlora.flows import outcomes, overview
from lcmlora.io.parsing import Malformed, parse_json

_PAGE = 200  # objects that Prefect returns in one answer, at most
_MOST = 2000  # runs that are read: more than a model a quarter of an hour for a week
_RETRAIN = FlowFilter(name=FlowFilterName(any_=["retrain"]))
_ENDED = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)
_WAITING = (StateType.SCHEDULED, StateType.PENDING)


@dataclass(frozen=True)
class Run:
    """A run: when it ended or is due, and how it ended."""

    time: datetime
    end: str  # the name of its state
    models: list[str] | None  # None: all of the project


@dataclass(frozen=True)
class Runs:
    """What Prefect knows about the runs."""

    ended: list[Run]  # the newest first
    going: int
    coming: list[Run]  # the next first
    stage_seconds: dict[str, dict[str, float]]  # by the artifact's key, then by stage


def read(since: datetime) -> Runs:
    """Returns the runs that ended since then and at least the last 200, those that go on, and those that are due.

    Raises:
        Unavailable: Prefect does not answer.
    """
    with overview.Client() as client:
        ended = [_run(run, run.end_time) for run in _ended(client, since)]
        going = client.count_flow_runs(
            flow_filter=_RETRAIN, flow_run_filter=_in_states(StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)
        )
        coming = client.read_flow_runs(
            flow_filter=_RETRAIN,
            flow_run_filter=_in_states(*_WAITING),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=_PAGE,
        )
        due = [_run(run, run.expected_start_time) for run in coming]
        return Runs(
            [run for run in ended if run is not None], going, [run for run in due if run is not None], _stages(client)
        )


def _in_states(*types: StateType) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types))))


def _ended(client: SyncPrefectClient, since: datetime) -> list[FlowRun]:
    found: list[FlowRun] = []
    while len(found) < _MOST:
        page = client.read_flow_runs(
            flow_filter=_RETRAIN,
            flow_run_filter=_in_states(*_ENDED),
            sort=FlowRunSort.END_TIME_DESC,
            limit=_PAGE,
            offset=len(found),
        )
        found += page
        oldest = found[-1].end_time if found else None
        if len(page) < _PAGE or oldest is None or oldest < since:
            break
    return found


def _run(run: FlowRun, time: datetime | None) -> Run | None:
    """Returns a run as metrics need it, None for one without the time: it was cancelled before it began."""
    if time is None:
        return None
    end = run.state.name if run.state and run.state.name else "Unknown"
    models = run.parameters.get("models")
    return Run(time, end, [str(model) for model in models] if isinstance(models, list) else None)


def _stages(client: SyncPrefectClient) -> dict[str, dict[str, float]]:
    """Returns the seconds of each stage when it last ran, from the artifacts that runs leave (outcomes)."""
    of_stages = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(like_=outcomes.STAGES_KEY))
    found: dict[str, dict[str, float]] = {}
    for artifact in client.read_latest_artifacts(artifact_filter=of_stages, limit=_PAGE):
        rows = artifact.data
        if isinstance(rows, str):
            try:
                rows = parse_json(rows.encode())
            except Malformed:  # another program's artifact of this name
                continue
        for row in rows if isinstance(rows, list) else ():
            stage, seconds = (row.get("stage"), row.get("seconds")) if isinstance(row, dict) else (None, None)
            if artifact.key and isinstance(stage, str) and isinstance(seconds, int | float):
                found.setdefault(artifact.key, {})[stage] = float(seconds)
    return found
