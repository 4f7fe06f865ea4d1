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
from lcmlora.flows import provision
from prefect.cli import app
from prefect.events import emit_event
provision.provide("mine", pool="lcmlora")
provision.provide("mine", pool="lcmlora")  # what is there stays
sys.argv[1:] = ["--no-prompt", "deploy", "--all"]
try:
    app()
except SystemExit as end:
    assert not end.code
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
    assert done.stdout.count("successfully created") == 7
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
    assert len(scheduled) == 3

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


def test_the_limit_has_one_slot_and_dead_runs_are_watched_for(api: Callable[..., Any]):
    limits = {each["name"]: each["limit"] for each in api("/v2/concurrency_limits/filter")}
    assert limits["mine"] == 1
    names = [each["name"] for each in api("/automations/filter")]
    assert len(names) == len(set(names)) == 3  # two of them are retrain's triggers
