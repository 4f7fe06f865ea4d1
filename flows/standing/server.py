"""The project's runs of the `retrain` flow on the configured Prefect server, and what is to come."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from lcmlora.errors import Unavailable
from lcmlora.flows import credentials
from lcmlora.io import faults
from lcmlora.io.parsing import as_object, read_yaml
from lcmlora.tasks.workspace.state import Running

_FLOW = FlowFilter(name=FlowFilterName(any_=["retrain"]))
_ENTRYPOINT = "retrain_models"  # of the deployments of this flow in prefect.yaml
_NEWEST, _NEXT = FlowRunSort.START_TIME_DESC, FlowRunSort.EXPECTED_START_TIME_ASC
_COMING = [StateType.SCHEDULED, StateType.PENDING]
GOING = (StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)
_PAGE = 200  # runs; Prefect returns no more in one answer
_STAGE = "stage "  # the beginning of the names of task runs that run a stage
_TIMELY = 60  # seconds after its time before a run that has not started is called late


@dataclass(frozen=True)
class Run:
    """A run of the `retrain` flow."""

    end: str  # the flow's state: Promoted, UpToDate, Failed, Running, ...
    time: str  # ISO 8601, UTC
    message: str | None
    name: str


@dataclass(frozen=True)
class Server:
    """What the server has of this project."""

    models: list[str]  # of params.yaml
    past: list[FlowRun]  # those that go on or have ended, the newest first
    coming: list[FlowRun]  # the next first
    deployments: list[DeploymentResponse]
    paused_pools: list[str]
    running: list[Running]  # stages

    def last_run(self, model: str) -> Run | None:
        """Returns the newest run that concerns the model. One that was cancelled before it began is none."""
        return next((as_run(run, model) for run in self.past if concerns(run, model) and has_begun(run)), None)

    def failure(self, model: str) -> Run | None:
        """Returns the newest run if it failed; runs that go on or were cancelled after it do not hide it."""
        for run in self.past:
            if concerns(run, model) and run.state is not None and has_ended(run):
                bad = run.state.type in (StateType.FAILED, StateType.CRASHED)
                return as_run(run, model) if bad and not self._failed_for_others(run, model) else None
        return None

    def _failed_for_others(self, run: FlowRun, model: str) -> bool:
        """Returns whether a run failed for other models alone: its message has a line for each error, by model."""
        lines = (run.state.message or "").split("\n") if run.state else []
        failed = {each for each in self.models for line in lines if line.startswith(f"{each}: ")}
        return bool(failed) and model not in failed

    def next_run(self, model: str, now: datetime) -> tuple[str | None, str | None]:
        """Returns when the model's next run is due, None if never; and what keeps runs from starting, None if nothing.

        A run whose time is over and that has not started is not the next one.
        """
        own = [run for run in self.coming if concerns(run, model) and run.expected_start_time]
        late = [run for run in own if _is_late(run, now)]
        due = next((run for run in own if run not in late), None)
        kept = [f"run {run.name} is {_end(run)}, and was due {_time(run.expected_start_time)}" for run in late[:1]]
        kept += [f"deployment {each.name} is paused" for each in self.deployments if each.paused]
        kept += [
            f"schedule {schedule.slug or schedule.id} of deployment {each.name} is paused"
            for each in self.deployments
            for schedule in each.schedules
            if not schedule.active and not each.paused
        ]
        kept += [f"work pool {name} is paused" for name in self.paused_pools]
        waits = own and any(each.status == "NOT_READY" for each in self.deployments if _deploys(each, own[0]))
        kept += ["no worker takes runs at the moment"] if waits else []
        return _time(due.expected_start_time) if due else None, "; ".join(kept) or None


def read(models: list[str]) -> Server:
    """Returns what the server has of the project in the current folder, whose models these are.

    Runs of deployments that its prefect.yaml does not name are another project's.

    Raises:
        Unavailable: Prefect does not answer.
        UserError: prefect.yaml cannot be read.
    """
    names = own_deployments()
    with Client() as client:
        every = client.read_deployments(flow_filter=_FLOW, limit=_PAGE)
        own = [each for each in every if names is None or each.name in names]
        past, coming = [], []
        for where in _places(own):
            coming += client.read_flow_runs(
                flow_filter=_FLOW, flow_run_filter=_filter(where, any_=_COMING), sort=_NEXT, limit=_PAGE
            )
            past += client.read_flow_runs(
                flow_filter=_FLOW, flow_run_filter=_filter(where, not_any_=_COMING), sort=_NEWEST, limit=_PAGE
            )
        ours = [run for run in past if any(concerns(run, model) for model in models)]
        going = [run for run in ours if run.state is not None and run.state.type in GOING]
        running = _stages(client, going)
        pools = sorted({each.work_pool_name for each in own if each.work_pool_name})
        paused = [name for name in pools if client.read_work_pool(name).is_paused]
    return Server(
        models,
        sorted(ours, key=_began, reverse=True),
        sorted(coming, key=lambda r: r.expected_start_time or _NEVER),
        own,
        paused,
        running,
    )


def runs_since(began: datetime) -> list[Run]:
    """Returns the project's runs of the `retrain` flow that were due since then and began, the newest first.

    Raises:
        Unavailable: Prefect does not answer.
        UserError: prefect.yaml cannot be read.
    """
    names = own_deployments()
    due = FlowRunFilterExpectedStartTime.model_validate({"after_": began})
    found: list[FlowRun] = []
    with Client() as client:
        every = client.read_deployments(flow_filter=_FLOW, limit=_PAGE)
        for where in _places([each for each in every if names is None or each.name in names]):
            chosen = _filter(where, not_any_=_COMING).model_copy(update={"expected_start_time": due})
            offset = 0
            while page := client.read_flow_runs(
                flow_filter=_FLOW, flow_run_filter=chosen, sort=_NEWEST, limit=_PAGE, offset=offset
            ):
                found += page
                offset += len(page)
    return [as_run(run) for run in sorted(found, key=_began, reverse=True) if has_begun(run)]


def own_deployments() -> set[str] | None:
    """Returns the names of the `retrain` flow's deployments in prefect.yaml; None if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    file = Path("prefect.yaml")
    if not file.is_file():
        return None
    entries = as_object(read_yaml(file), str(file)).get("deployments")
    found = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    return {str(each.get("name")) for each in found if str(each.get("entrypoint")).endswith(_ENTRYPOINT)}


def concerns(run: FlowRun, model: str) -> bool:
    """Returns whether a run is, was or will be about this model."""
    models = run.parameters.get("models")
    return models is None or model in models


def has_begun(run: FlowRun) -> bool:
    """Returns False for a run that was cancelled before it began, as one is that is due while another one goes."""
    # Prefect gives every run that is over a start time.
    return run.run_count > 0 or run.state is None or run.state.type is not StateType.CANCELLED


def has_ended(run: FlowRun) -> bool:
    """Returns whether a run came to an end of its own: it does not go on, and was not cancelled."""
    return run.state is not None and run.state.type in (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED)


def as_run(run: FlowRun, model: str | None = None) -> Run:
    """Returns the record of a run. With a model, its message is what concerns this model."""
    message = run.state.message if run.state else None
    if message and model is not None:
        own = [line for line in message.split("\n") if line.startswith(f"{model}: ")]
        message = "\n".join(line.removeprefix(f"{model}: ") for line in own) or message
    return Run(_end(run), _time(run.start_time or run.expected_start_time) or "", message, run.name)


class Client:
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
            raise Unavailable(f"Prefect at {api}: {faults.chain(error)}") from error


def _places(deployments: list[DeploymentResponse]) -> list[FlowRunFilterDeploymentId]:
    """Returns the filters of the project's runs: of its deployments, and by hand."""
    by_hand = [FlowRunFilterDeploymentId(is_null_=True)]
    own = [each.id for each in deployments]
    return [FlowRunFilterDeploymentId(any_=own), *by_hand] if own else by_hand


def _filter(where: FlowRunFilterDeploymentId, **types: list[StateType]) -> FlowRunFilter:
    state = FlowRunFilterState(type=FlowRunFilterStateType.model_validate(types))
    return FlowRunFilter(deployment_id=where, state=state)


def _stages(client: SyncPrefectClient, runs: list[FlowRun]) -> list[Running]:
    """Returns the stages that these runs run at the moment, on whatever machine."""
    if not runs:
        return []
    names = {run.id: run.name for run in runs}
    found = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(names))),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING]))),
        limit=_PAGE,
    )
    return [
        Running(each.name.removeprefix(_STAGE), _time(each.start_time), run=names.get(each.flow_run_id))
        for each in found
        if each.name.startswith(_STAGE) and each.flow_run_id is not None
    ]


def _is_late(run: FlowRun, now: datetime) -> bool:
    expected = run.expected_start_time
    return expected is not None and (now - expected).total_seconds() > _TIMELY


def _deploys(deployment: DeploymentResponse, run: FlowRun) -> bool:
    return deployment.id == run.deployment_id


_NEVER = datetime.max.replace(tzinfo=UTC)


def _began(run: FlowRun) -> datetime:
    return run.start_time or run.expected_start_time or _NEVER


def _end(run: FlowRun) -> str:
    return run.state.name or run.state.type.value if run.state else "Unknown"


def _time(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if moment else None
