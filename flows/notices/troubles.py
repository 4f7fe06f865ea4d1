"""What only somebody from outside a run can tell: that it is stuck or has crashed, or that the disk is nearly full."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort, LogSort

from lcmlora.config import Config
from lcmlora.flows import memory
from lcmlora.flows.memory import Memory
from lcmlora.flows.notices import links, repeats
from lcmlora.flows.notices.event import Event
from lcmlora.flows.servers import definitions
from lcmlora.io.private import downloads
from lcmlora.settings.operation.notify import EventKind

_PAGE = 200  # runs; Prefect returns no more in one answer
_ENDED_HOURS = 24  # how long ago a run may have crashed that is told
_ONGOING = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)


def stuck_runs(settings: Config, now: datetime.datetime) -> Iterator[Event]:
    """Yields the runs on Prefect's server that are late, wait too long for a process or a slot, or have been silent."""
    with get_client(sync_client=True) as client:
        for run in _runs(client, FlowRunFilterState(type=FlowRunFilterStateType(any_=list(_ONGOING)))):
            if reason := _why_stuck(run, settings, now, lambda run=run: _last_line(client, run.id)):
                name = client.read_flow(run.flow_id).name
                yield Event(
                    "stuck", f"a run of {name} {reason}", links=links.of_run(str(run.id)), run=str(run.id), looked=True
                )


def _why_stuck(run: FlowRun, settings: Config, now: datetime.datetime, last_line: Any) -> str | None:
    """Returns why a run needs a person, None if it does not.

    Args:
        last_line: returns the time of the last line of its log, None where it has none. It is a request.
    """
    if run.state is None:
        return None
    late = datetime.timedelta(minutes=settings.notify.late_minutes)
    silent = datetime.timedelta(minutes=settings.notify.silent_minutes)
    since = run.state.timestamp
    if run.state.type == StateType.SCHEDULED:
        due = run.expected_start_time
        if due is not None and now - due > late:
            return f"should have started at {_time(due)}: is a worker running? `lcmlora up` starts one again"
    elif run.state.type in (StateType.PENDING, StateType.CANCELLING):
        if now - since > late:
            doing = "is being cancelled" if run.state.type == StateType.CANCELLING else "waits for its process"
            return f"{doing} since {_time(since)}: is the worker alive, and is there a machine for it?"
    elif run.state.type == StateType.RUNNING and now - since > silent:
        heard = max(filter(None, (since, last_line())))
        if now - heard > silent:
            return f"runs since {_time(since)} and has said nothing since {_time(heard)}"
    return None


def crashed_runs(settings: Config, now: datetime.datetime) -> Iterator[Event]:
    """Yields the runs of the last day that ended without telling it themselves: they crashed, or never got to start."""
    told = Memory(repeats.SUBJECT, settings).read()
    ended = FlowRunFilterEndTime.model_validate({"after_": now - datetime.timedelta(hours=_ENDED_HOURS)})
    failed = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED, StateType.FAILED]))
    with get_client(sync_client=True) as client:
        for run in _runs(client, failed, ended):
            if not repeats.has_told_its_failure(str(run.id), told):
                said = run.state.message if run.state and run.state.message else "Prefect has no reason"
                end = f"ended as {run.state.name}" if run.state else "failed"
                reason = f"a run of {client.read_flow(run.flow_id).name} {end}: {said}"
                yield _found("failed", reason, run)


def _found(kind: EventKind, reason: str, run: FlowRun) -> Event:
    return Event(kind, reason, links=links.of_run(str(run.id)), run=str(run.id), looked=True)


def full_disks(settings: Config) -> Iterator[Event]:
    """Yields the file systems of the project and of the downloads that have less free than `notify.disk_gb`."""
    seen: dict[int, tuple[Path, float]] = {}
    for path in (Path.cwd(), downloads("bases")):
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        seen.setdefault(there.stat().st_dev, (there, shutil.disk_usage(there).free / 1e9))
    for folder, free in seen.values():
        if free < settings.notify.disk_gb:
            yield Event(
                "disk",
                f"{folder}: {free:.1f} GB are free, less than the {settings.notify.disk_gb:g} GB of notify.disk_gb; "
                "docs/guides/retention.md says what may be deleted",
                figures={"free GB": free},
                looked=True,
            )


def _runs(
    client: SyncPrefectClient, state: FlowRunFilterState, ended: FlowRunFilterEndTime | None = None
) -> list[FlowRun]:
    """Returns runs of the project's deployments: another project may share the server."""
    path = Path("prefect.yaml")
    names = {name for _, name in definitions.deployments(path)} if path.is_file() else {memory.project()}
    ours = DeploymentFilter(name=DeploymentFilterName(any_=sorted(names)))
    asked = FlowRunFilter(state=state, end_time=ended)
    # Runs of the future are scheduled as well, and come last.
    order = FlowRunSort.EXPECTED_START_TIME_ASC if ended is None else FlowRunSort.START_TIME_DESC
    return client.read_flow_runs(deployment_filter=ours, flow_run_filter=asked, sort=order, limit=_PAGE)


def _last_line(client: SyncPrefectClient, run: UUID) -> datetime.datetime | None:
    of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    found = client.read_logs(log_filter=of_run, limit=1, sort=LogSort.TIMESTAMP_DESC)
    return found[0].timestamp if found else None


def _time(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
