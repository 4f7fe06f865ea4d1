"""A run that a worker does for a real Prefect server, cancelled as its page does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.flows.conftest import STAGES
from tests.integration.tracking_servers import PREFECT, PrefectServer
from tests.support import repositories
from tests.support.registries import fresh
from tests.support.releases import settings
from tests.support.repositories import alive

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

# It ends as PyTorch does, whatever it is doing, and what it wrote before stays.
DISTILL = "echo 'step 7' > scratch/checkpoint; echo $$ > pid.part; mv pid.part pid; exec sleep 300\n"


@pytest.fixture
def project(base_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = repositories.make(tmp_path / "project", STAGES)
    for folder in ("stock", "scratch"):
        (root / folder).mkdir()
    (root / "stock/a").write_text("a")
    (root / "pictures").write_text("{}\n")
    (root / "distill.sh").write_text(DISTILL)
    registry = {"tracking_uri": fresh(root, tmp_path_factory).tracking_uri}
    raw = settings(base_folder, models=("a",), registry=registry, flow={"gpu_limit": "gpu-of-cancel"})
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return root


def test_cancelling_a_run_ends_its_trainer_and_leaves_its_checkpoint(
    prefect_server: PrefectServer, project: Path, monkeypatch: pytest.MonkeyPatch
):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
    from prefect.states import Cancelling

    prefect_server.wait()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {
        "PYTHONPATH": str(ROOT),
        **prefect_server.environment,
        "PREFECT_HOME": str(project / "prefect"),
    }
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "cancel", "--type", "process"]
    reached = {PREFECT_API_URL: prefect_server.api, PREFECT_API_AUTH_STRING: PREFECT.pair}
    with temporary_settings(reached), get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="cancel", type="process"))
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="gpu-of-cancel", limit=1))
        deployed = client.create_deployment(
            client.create_flow_from_name("retrain"),
            "cancel",
            work_pool_name="cancel",
            entrypoint="lcmlora.flows.retrain.retrain_models",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(project)}}],
        )
        run = client.create_flow_run_from_deployment(deployed)
        worker = subprocess.Popen(command, env=environment, cwd=project, start_new_session=True)
        try:
            pid = _wait(lambda: (project / "pid").exists() and int((project / "pid").read_text()), 400)
            client.set_flow_run_state(run.id, Cancelling())
            _wait(lambda: not alive(pid), 60)  # ten seconds, on a machine that does nothing else
            assert (project / "scratch/checkpoint").read_text() == "step 7\n"
            _wait(lambda: client.read_flow_run(run.id).state.name == "Cancelled", 60)
            assert client.read_global_concurrency_limit_by_name("gpu-of-cancel").active_slots == 0
        finally:
            os.killpg(worker.pid, signal.SIGKILL)  # asked to end, it now and then does not
            worker.wait()
            client.delete_deployment(deployed)  # other tests use this server, too


def _wait(what, seconds: float):
    """Returns what `what` gives once it is true."""
    until = time.monotonic() + seconds
    while not (given := what()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return given
