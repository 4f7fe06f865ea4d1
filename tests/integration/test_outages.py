"""What a run outlives: its server away for minutes, its worker killed, its temporary server killed.

LCMLORA_OUTAGE_MINUTES=3 or 1,3,10 sets how long the server is away.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import psutil
import pytest
import torch
import yaml

from lcmlora import bases
from lcmlora.config import Base
from lcmlora.io.files import sha256_folder
from lcmlora.project import Project
from lcmlora.releases import bundle, package
from tests.flows.conftest import STAGES
from tests.integration.relay import Wire
from tests.integration.tracking_servers import PrefectServer
from tests.support import repositories
from tests.support.deployed import ROOT, Deployed, wait_for
from tests.support.miniature import RESOLUTION
from tests.support.registries import fresh
from tests.support.releases import load_settings, settings, write_stages
from tests.support.repositories import alive

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MINUTES = [float(minutes) for minutes in os.environ.get("LCMLORA_OUTAGE_MINUTES", "1").split(",")]
# It lasts until a file says that it may end, and shows its progress.
DISTILL = """
echo $$ > pid.part; mv pid.part pid; echo $1 >> distilled
while test ! -e may-end; do sleep 0.5; done
echo "distill a: 2/2  2.0/s  0 s left  loss 0.1" >&2
mkdir -p adapters
cp -r stock/adapters/$1 adapters
"""


@pytest.fixture(scope="module")
def stock(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What distill, evaluate and package give, for the very base that is on disk."""
    root = tmp_path_factory.mktemp("stock")
    base = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    write_stages(bases.load("a", base, base_folder, device=torch.device("cpu")), root, model="a")
    made = root / "adapters/a/config.json"
    facts = json.loads(made.read_text())
    facts["base"]["digest"] = sha256_folder(base_folder / "unet")
    made.write_text(json.dumps(facts))
    package.package_release("a", load_settings(base_folder, models=("a",)), Project(root), base_folder)
    (root / "a").write_text("a")
    return root


@pytest.fixture
def root(base_folder: Path, stock: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages copy what was made beforehand."""
    root = repositories.make(tmp_path / f"project-{os.getpid()}-{tmp_path.name}", STAGES.replace("[a, b, c]", "[a]"))
    (root / "stock").symlink_to(stock)
    (root / "pictures").write_text("{}\n")
    (root / "distill.sh").write_text(DISTILL)
    registry = {"tracking_uri": fresh(root, tmp_path_factory).tracking_uri}
    raw = settings(base_folder, models=("a",), registry=registry, flow={"gpu_limit": f"gpu-of-{root.name}"})
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return root


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server that these tests kill."""
    server = PrefectServer(tmp_path_factory.mktemp("own-prefect-server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@dataclass
class Training:
    """A run whose distillation goes on until it may end."""

    site: Deployed
    run: UUID

    @property
    def trainer(self) -> int:
        return int((self.site.root / "pid").read_text())

    @property
    def engine(self) -> psutil.Process:
        """The process of the flow."""
        flows = [each for each in self.site.processes() if "prefect.engine" in each.cmdline()]
        (found,) = flows
        return found

    def may_end(self) -> None:
        (self.site.root / "may-end").touch()

    def ends_as(self, name: str) -> None:
        ends = ("Promoted", "Reproduced", "Failed", "Crashed", "Cancelled")
        state = wait_for(lambda: (now := self.site.state(self.run)) in ends and now)
        assert state == name, (self.site.history(self.run), (self.site.root / "worker.log").read_text()[-3000:])

    def assert_whole(self) -> None:
        """One version, one release with the right digest, nothing left, nothing that the server was not told."""
        from mlflow import MlflowClient

        root = self.site.root
        uri = f"sqlite:///{root}/mlflow.db"
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        (version,) = client.search_model_versions("name = 'lcm-lora-a'")
        sha256 = bundle.digest(root / "release/a")
        assert version.tags["sha256"] == sha256
        assert {k: int(v) for k, v in client.get_registered_model("lcm-lora-a").aliases.items()} == {"champion": 1}
        manifests = list(root.glob("releases/**/manifest.json"))
        assert [path.parent.name for path in manifests] == [f"sha256-{sha256[:12]}"]
        assert self.site.left() == []
        with self.site.client() as prefect:
            asked = {"artifacts": {"flow_run_id": {"any_": [str(self.run)]}}}
            keys = {each["key"] for each in prefect.request("POST", "/artifacts/filter", json=asked).json()}
            tasks = {"flow_runs": {"id": {"any_": [str(self.run)]}}}
            states = wait_for(lambda: _ended(prefect.request("POST", "/task_runs/filter", json=tasks).json()), 60)
        assert keys >= {"progress-distill-a", "retrain", "figures-a", "card-a", "release-a"}
        assert states == {"Completed"}


def _ended(tasks: list[dict[str, object]]) -> set[str]:
    """Returns the states of the last attempt's tasks once none is under way: their events come in after its end."""
    last = max(int(str(task["flow_run_run_count"])) for task in tasks)
    states = {str(task["state_name"]) for task in tasks if task["flow_run_run_count"] == last}
    return set() if states & {"Running", "Pending"} else states


@pytest.fixture
def site(own_server: PrefectServer, root: Path) -> Iterator[Deployed]:
    site = Deployed(root, f"gpu-of-{root.name}", own_server)
    try:
        yield site
    finally:
        site.end()


def start(site: Deployed) -> Training:
    """Returns a run that trains."""
    site.start_worker()
    training = Training(site, site.start_run(site.deploy()))
    wait_for((site.root / "pid").exists)
    return training


@pytest.mark.parametrize("minutes", MINUTES)
@pytest.mark.parametrize("ends", ["while the server is away", "after its return"])
def test_a_server_that_is_away_for_minutes_is_missed_by_no_run(site: Deployed, minutes: float, ends: str):
    training = start(site)
    site.server.kill()
    if ends == "while the server is away":
        training.may_end()
    time.sleep(60 * minutes)
    assert alive(training.trainer) or ends == "while the server is away"
    site.server.start()
    if ends == "after its return":
        time.sleep(45)  # leases have been looked at, and heartbeats were due
        assert alive(training.trainer)
        with site.client() as client:
            assert client.read_global_concurrency_limit_by_name(site.limit).active_slots == 1
        training.may_end()
    training.ends_as("Promoted")
    assert "Crashed" not in site.history(training.run)
    training.assert_whole()


def test_a_server_that_cannot_be_reached_gives_no_slot_away_for_good(own_server: PrefectServer, root: Path):
    """The server lives, misses heartbeats, and takes the slot away, which it can be asked for again."""
    port = urlsplit(own_server.api).port
    assert port is not None
    with Wire(port) as wire:
        site = Deployed(root, f"gpu-of-{root.name}", own_server, api=f"http://127.0.0.1:{wire.port}/api")
        try:
            training = start(site)
            wire.cut()

            def slots() -> int:
                with site.client() as client:
                    return client.read_global_concurrency_limit_by_name(site.limit).active_slots

            wait_for(lambda: slots() == 0, 180)
            wire.mend()
            wait_for(lambda: slots() == 1, 60)
            training.may_end()
            training.ends_as("Promoted")
            training.assert_whole()
        finally:
            site.end()


def test_a_run_goes_on_when_its_worker_is_killed_and_the_next_worker_leaves_it_alone(site: Deployed):
    training = start(site)
    site.kill_worker()
    time.sleep(5)
    assert alive(training.trainer)
    assert site.take_up_runs() == []
    site.start_worker()
    training.may_end()
    training.ends_as("Promoted")
    assert site.history(training.run).count("Running") == 1
    training.assert_whole()


def test_a_run_that_is_killed_with_its_worker_is_resumed_by_the_next_one_at_once(site: Deployed):
    training = start(site)
    trainer = training.trainer
    engine = training.engine
    site.kill_worker()
    engine.kill()
    wait_for(lambda: not alive(trainer), 60)
    assert len(site.take_up_runs()) == 1
    (site.root / "pid").unlink()
    site.start_worker()
    wait_for((site.root / "pid").exists)
    training.may_end()
    training.ends_as("Promoted")
    assert site.history(training.run).count("AwaitingRetry") == 1
    training.assert_whole()


def test_a_run_whose_worker_is_killed_before_it_began_is_taken_up(site: Deployed):
    run = site.start_run(site.deploy())
    training = Training(site, run)
    site.start_worker()
    wait_for(lambda: site.state(run) in ("Pending", "Submitting"))
    site.end()  # with what it had started
    assert site.state(run) in ("Pending", "Submitting")
    assert len(wait_for(site.take_up_runs, 120)) == 1
    training.may_end()
    site.start_worker()
    training.ends_as("Promoted")
    training.assert_whole()


def test_a_run_without_a_worker_ends_when_it_is_cancelled(site: Deployed):
    from prefect.states import Cancelling

    training = start(site)
    trainer = training.trainer
    site.kill_worker()
    with site.client() as client:
        client.set_flow_run_state(training.run, Cancelling())
    training.ends_as("Cancelled")
    assert not alive(trainer)
    assert site.left() == []


def test_a_flow_by_hand_goes_on_when_its_temporary_server_is_killed(root: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "LCMLORA_"))} | {
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(root / "prefect"),
    }
    log = root / "log"
    with log.open("wb") as output:
        flow = subprocess.Popen(
            [sys.executable, "-m", "flows.retrain"], cwd=root, env=environment, stdout=output, stderr=output
        )
    wait_for((root / "pid").exists)
    (server,) = [each for each in psutil.Process(flow.pid).children() if "uvicorn" in each.cmdline()]
    server.send_signal(signal.SIGKILL)
    wait_for(lambda: "it is started again, and the run goes on" in log.read_text(), 20)
    (root / "may-end").touch()
    assert flow.wait(300) == 0, log.read_text()
    assert "lcm-lora-a/1 @champion" in log.read_text()
    assert not psutil.pid_exists(server.pid)
