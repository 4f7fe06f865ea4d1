"""The deployments of prefect.yaml on a real server: schedules fire, and what `watch` tells starts a retrain."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lcmlora.flows.services import NO_TELEMETRY, POOL
from tests.integration.tracking_servers import PREFECT, PrefectServer

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
# One process for all, since importing Prefect and the flows takes longer than the work.
DEPLOY = """
import sys
from pathlib import Path
from lcmlora.flows import provision
from lcmlora.flows.servers import definitions
from prefect.cli import app
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events import emit_event
provision.provide("mine", pool="lcmlora")
provision.provide("mine", pool="lcmlora")  # what is there stays
with get_client(sync_client=True) as client:  # as a project of 0.2.0, and somebody else, have left them
    client.create_work_pool(WorkPoolCreate(name="of-another", type="process"))
    for flow, pool in (("retrain", "lcmlora"), ("theirs", "of-another")):
        flow_id = client.create_flow_from_name(flow)
        client.create_deployment(flow_id, "scheduled", work_pool_name=pool, entrypoint="lcmlora.flows.retrain.retrain")
sys.argv[1:] = ["--no-prompt", "deploy", "--all"]
try:
    app()
except SystemExit as end:
    assert not end.code
deployed = definitions.deployments(Path("prefect.yaml"))
print("former:", provision.remove_former(deployed), provision.remove_former(deployed))
for project, model in (("of another", "a"), ("lcmlora", "b")):
    resource = {"prefect.resource.id": f"lcmlora.base.{model}", "lcmlora.project": project}
    emit_event("lcmlora.base.changed", resource=resource, payload={"models": [model]})
"""


@pytest.fixture(scope="module")
def api(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Asks the server, on which everything is deployed, with a POST of JSON."""
    prefect_server.wait()
    environment = os.environ | NO_TELEMETRY | prefect_server.environment
    environment["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
    done = subprocess.run([sys.executable, "-c", DEPLOY], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("successfully created") == 8
    assert "former: 1 0\n" in done.stdout
    with httpx.Client(base_url=prefect_server.api, auth=(PREFECT.name, PREFECT.password), timeout=30) as client:
        yield lambda path, **question: client.post(path, json=question).raise_for_status().json()


def _wait(found: Callable[[], list[Any]]) -> list[Any]:
    until = time.monotonic() + 60
    while not (there := found()) and time.monotonic() < until:
        time.sleep(0.3)
    return there


def test_every_schedule_has_runs_that_wait_for_their_time(api: Callable[..., Any]):
    deployments = {each["id"]: each for each in api("/deployments/filter")}
    scheduled = {each for each, deployment in deployments.items() if deployment["schedules"]}
    assert len(scheduled) == 4

    def due() -> list[dict[str, Any]]:
        runs = api("/flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}})
        runs = [run for run in runs if (run["created_by"] or {}).get("type") == "SCHEDULE"]
        return runs if {run["deployment_id"] for run in runs} == scheduled else []

    assert _wait(due)


def test_a_changed_base_starts_a_retrain_of_its_model(api: Callable[..., Any]):
    def started() -> list[dict[str, Any]]:
        runs = api("/flow_runs/filter", flow_runs={"tags": {"all_": ["gpu"]}})
        return [run for run in runs if (run["created_by"] or {}).get("type") == "AUTOMATION"]

    (run,) = _wait(started)
    assert run["parameters"] == {"models": ["b"]}
    assert run["work_pool_name"] == POOL


def test_deployments_with_their_former_names_are_removed_and_those_of_others_stay(api: Callable[..., Any]):
    found = {(each["name"], each["work_pool_name"]) for each in api("/deployments/filter")}
    assert found == {("lcmlora", "lcmlora"), ("scheduled", "of-another")}


def test_the_limit_has_one_slot_and_dead_runs_are_watched_for(api: Callable[..., Any]):
    limits = {each["name"]: each["limit"] for each in api("/v2/concurrency_limits/filter")}
    assert limits["mine"] == 1
    names = [each["name"] for each in api("/automations/filter")]
    assert len(names) == len(set(names)) == 3  # two of them are retrain's triggers
