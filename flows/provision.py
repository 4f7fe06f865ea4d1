"""Making what the flows need on a Prefect server: the work pool, the GPU limit, an automation for dead runs.

Only what is missing is made, so that changes that people make on the server stay.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

DEAD = "lcmlora: runs whose heartbeats stop have crashed"
_FORMER_POOL = "lcmlora"
_FORMER = ("scheduled", "quarter-hourly", "weekly", "by-hand")  # names of deployments
_HEARTBEAT = "prefect.flow-run.heartbeat"


def provide(limit: str, *, pool: str | None, kind: str = "process", template: dict[str, Any] | None = None) -> None:
    """Makes the limit with one slot, the automation, and the work pool of this name, unless it is None.

    Args:
        kind: of the pool: process, docker, kubernetes.
        template: of the pool's jobs; None for Prefect's own.
    """
    with get_client(sync_client=True) as client:
        if pool:
            try:
                client.read_work_pool(pool)
            except ObjectNotFound:
                client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=template or {}))
        try:
            client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit, limit=1))
        if not client.read_automations_by_name(DEAD):
            client.create_automation(dead_runs())


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
    """Returns the automation that marks a run as Crashed if its worker died with it, which gives its slots back.

    A living worker notices itself that a run's process has ended.
    """
    return AutomationCore(
        name=DEAD,
        description="A run that was killed together with its worker would stay Running and keep its slots.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            # Not by the names of final states: our runs end in states of their own, such as UpToDate.
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            # Six heartbeats of what `lcmlora up` starts: a machine whose cores are all busy may be late.
            within=timedelta(seconds=180),
        ),
        actions=[
            ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message="Its heartbeats stopped.", force=False)
        ],
    )


def cancel_runs(pool: str) -> int:
    """Asks the workers of a pool to cancel their runs, and returns how many runs have not ended yet."""
    going = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=going))),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        )
        for run in runs:
            if run.state_type != StateType.CANCELLING:
                client.set_flow_run_state(run.id, Cancelling(message="lcmlora down"))
    return len(runs)
