"""Making what the flows need on a Prefect server: the work pool, the GPU limit, an automation for dead runs.

Only what is missing is made, so that changes that people make on the server stay.
"""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed

from lcmlora.errors import UserError

DEAD = "lcmlora: runs whose heartbeats stop have crashed"
_OF_PROJECT = "project whose first commit is {}"  # in a work pool's description
_FORMER_POOL = "lcmlora"
_FORMER = ("scheduled", "quarter-hourly", "weekly", "by-hand")  # names of deployments
_HEARTBEAT = "prefect.flow-run.heartbeat"
_SILENCE = timedelta(minutes=30)
_RESUMED = ("retrain",)  # flows that go on from where they were; a second `rollback` would go back once more
_UNNAMED = timedelta(minutes=1)
_FORMER_SILENCE = timedelta(minutes=3)  # of lcmlora 0.1: a server that restarted took living runs for dead


def provide(
    limit: str,
    *,
    pool: str | None,
    kind: str = "process",
    template: dict[str, Any] | None = None,
    project: str | None = None,
) -> None:
    """Makes the limit with one slot, the automation, and the work pool of this name, unless it is None.

    Args:
        kind: of the pool: process, docker, kubernetes.
        template: of the pool's jobs; None for Prefect's own.
        project: the first commit of the project that the pool is of. Its description says so from then on.

    Raises:
        UserError: the pool is another project's.
    """
    with get_client(sync_client=True) as client:
        if pool:
            try:
                _claim(client, pool, project)
            except ObjectNotFound:
                text = None if project is None else _OF_PROJECT.format(project)
                made = WorkPoolCreate(name=pool, type=kind, base_job_template=template or {}, description=text)
                client.create_work_pool(made)
        try:
            client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit, limit=1))
        automations = client.read_automations_by_name(DEAD)
        if not automations:
            client.create_automation(dead_runs())
        for each in automations:
            if isinstance(each.trigger, EventTrigger) and each.trigger.within == _FORMER_SILENCE:
                client.update_automation(each.id, dead_runs().model_copy(update={"enabled": each.enabled}))


def _claim(client: SyncPrefectClient, pool: str, project: str | None) -> None:
    """Writes into a pool that is there which project it is of, where nothing says so yet.

    Two projects of one name would replace each other's deployments and take each other's runs.

    Raises:
        UserError: it is another project's.
        ObjectNotFound: there is no such pool.
    """
    described = client.read_work_pool(pool).description or ""
    owner = re.search(_OF_PROJECT.format("([0-9a-f]+)"), described)
    if project is None or (owner and owner[1] == project):
        return
    if owner:
        raise UserError(
            f"work pool {pool}: belongs to another project on this server: its history begins with commit "
            f"{owner[1][:12]}, this one's with {project[:12]}. Give one of them another name: `name` in "
            ".lcmlora/project.json, then `lcmlora upgrade`. If it is this project with a new history, delete from the "
            "pool's description the line that names the commit"
        )
    lines = [described, _OF_PROJECT.format(project)] if described else [_OF_PROJECT.format(project)]
    client.update_work_pool(pool, WorkPoolUpdate(description="\n".join(lines)))


def remove_former(deployed: set[tuple[str, str]]) -> int:
    """Deletes the deployments that lcmlora gave other names until 0.2.0; their past runs stay.

    Their schedules would start runs for which there is no worker. To be called on a server of this project alone.

    Args:
        deployed: entrypoints and names of those that are deployed now.

    Returns:
        How many there were.
    """
    with get_client(sync_client=True) as client:
        there = client.read_deployments(limit=200)
        former = [each for each in there if each.name in _FORMER and each.work_pool_name == _FORMER_POOL]
        found = [each for each in former if (each.entrypoint, each.name) not in deployed]
        for each in found:
            client.delete_deployment(each.id)
    return len(found)


def dead_runs() -> AutomationCore:
    """Returns the automation that marks a run as Crashed if its machine died with it.

    A living worker notices itself that a run's process has ended, and takes up the runs that a dead one has left
    (`take_up_runs`). So this is for machines that do not come back. Their slots become free before, as the leases
    on them end.

    A server that was away has missed heartbeats, and looks at once for runs without them when it is back. So runs may
    be silent for longer than a server is usually away. One that is away for longer takes living runs for dead, which
    then put themselves right (`lcmlora.tasks.outages.own_state`).
    """
    return AutomationCore(
        name=DEAD,
        description="A run that was killed together with its machine would stay Running.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            # Not by the names of final states: our runs end in states of their own, such as UpToDate.
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_SILENCE,
        ),
        actions=[
            ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message="Its heartbeats stopped.", force=False)
        ],
    )


def take_up_runs(pool: str, worker: str, before: datetime) -> list[str]:
    """Puts right the runs of a pool that a killed worker of this name has left, and returns a line for each of them.

    A run that had not begun is scheduled anew, at once, and so is one of `retrain`, which goes on from where it was. A
    run of another flow has crashed: the schedule brings the next one, or a person who wanted it starts it again.

    Args:
        before: runs that have changed since then are left alone: the worker of this name may be at work on them.
    """
    lines = []
    with get_client(sync_client=True) as client:
        for run in _runs_under_way(client, pool):
            state = run.state
            if state is None or state.timestamp > before or not _is_left_behind(run, worker) or is_alive(run.id):
                continue
            todo = what_becomes_of(state, client.read_flow(run.flow_id).name)
            answer = client.set_flow_run_state(run.id, todo)
            if answer.status == SetStateStatus.ACCEPT:
                lines.append(f"the run {run.name}, which a killed worker has left {state.name}, is {todo.name} now")
    return lines


def what_becomes_of(state: State[Any], flow: str) -> State[Any]:
    """Returns the state for a run that no process does any more, by its last state and the name of its flow."""
    if state.is_cancelling():
        return Cancelled(message="Its worker has ended.")
    if state.is_pending() or flow in _RESUMED:
        return AwaitingRetry(message="Its worker has ended; the next one takes it up.")
    return Crashed(message="It ended together with its worker.")


def _is_left_behind(run: FlowRun, worker: str) -> bool:
    """Returns whether a process worker of this name was to do the run. A worker labels a run within a second."""
    name, kind = run.labels.get("prefect.worker.name"), run.labels.get("prefect.worker.type")
    if name is None and run.state is not None and run.state.is_pending():
        return datetime.now(UTC) - run.state.timestamp > _UNNAMED
    return name == worker and kind == "process"  # the runs of others are in containers


def is_alive(run: UUID) -> bool:
    """Returns whether a process of this machine does the run."""
    mark = str(run)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # The commands that a run has started have the variable, too, and end soon after it.
            if process.environ().get("PREFECT__FLOW_RUN_ID") == mark and any(
                word.startswith("prefect.") or "/prefect/runner/" in word for word in process.cmdline()
            ):
                return process.status() != psutil.STATUS_ZOMBIE
    return False


def cancel_runs(pool: str) -> int:
    """Asks the workers of a pool to cancel their runs, and returns how many runs have not ended yet."""
    with get_client(sync_client=True) as client:
        runs = _runs_under_way(client, pool)
        for run in runs:
            if run.state_type != StateType.CANCELLING:
                client.set_flow_run_state(run.id, Cancelling(message="lcmlora down"))
    return len(runs)


def _runs_under_way(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    going = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=going))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
    )
