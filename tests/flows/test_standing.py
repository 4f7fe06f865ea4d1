"""What the server's runs say of a model: the failure behind a collision, and the run that really comes next."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled, State

from lcmlora.flows.standing.server import read, runs_since
from lcmlora.tasks.output import slug

NOW = datetime.now(UTC)
MODELS = ["a", "b"]


class Deployed:
    """A deployment of a flow named `retrain` on the tests' server."""

    def __init__(self, client: SyncPrefectClient, name: str, *, paused: bool = False) -> None:
        self.client, self.name = client, name
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *"), active=False, slug="nightly")
        self.id: UUID = client.create_deployment(
            client.create_flow_from_name("retrain"), name=name, paused=paused, schedules=[schedule]
        )

    def run(self, *states: State, models: list[str] | None = None, stage: str | None = None) -> str:
        """Makes a run that goes through these states, now in this stage, and returns its name."""
        first, *more = states
        made = self.client.create_flow_run_from_deployment(self.id, parameters={"models": models}, state=first)
        for state in more:
            self.client.set_flow_run_state(made.id, state, force=True)
        if stage is not None:
            task = {"name": f"stage {stage}", "task_key": "repro", "dynamic_key": "0", "state": {"type": "RUNNING"}}
            answer = self.client.request("POST", "/task_runs/", json=task | {"flow_run_id": str(made.id)})
            assert answer.is_success
        return made.name


@pytest.fixture
def client(prefect: None):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the only `retrain` deployment of a project, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    name = slug(request.node.name)
    entries = [{"name": name, "entrypoint": "lcmlora.flows.retrain.retrain_models"}, {"name": "weekly"}]
    Path("prefect.yaml").write_text(yaml.safe_dump({"deployments": entries}))
    return name


def test_neither_a_collision_nor_a_cancelled_run_nor_another_model_hides_a_failure(client, name: str):
    message = "a: distill@a: step 7: the loss is not finite\nb: MLflow does not answer"
    own = Deployed(client, name)
    failed = own.run(Running(), Failed(message=message))
    own.run(Scheduled(), Cancelled(message="Deployment concurrency limit reached."))
    found = read(MODELS)
    assert found.last_run("a").name == found.failure("a").name == failed
    assert found.failure("a").message == "distill@a: step 7: the loss is not finite"
    assert found.failure("b").message == "MLflow does not answer"
    cancelled = own.run(Running(), Cancelled(message="by a person"))
    found = read(MODELS)
    assert (found.last_run("a").name, found.failure("a").name) == (cancelled, failed)
    own.run(Running(), Failed(message="b: evaluate@b: no memory"), models=["b"])
    going = own.run(Running(), models=["a"], stage="distill@a")
    found = read(MODELS)
    assert [(each.stage, each.run, bool(each.since)) for each in found.running] == [("distill@a", going, True)]
    assert (found.last_run("a").name, found.failure("a").name) == (going, failed)
    own.run(Running(), Failed(message="b: evaluate@b: no memory"))  # of both models, of which only b failed
    assert read(MODELS).failure("a") is None and read(MODELS).failure("b").message == "evaluate@b: no memory"
    own.run(Running(), Completed(name="Promoted"))
    assert read(MODELS).failure("a") is None and read(MODELS).failure("b") is None
    crashed = own.run(Scheduled(), Crashed(message="the worker could not start it"))
    assert read(MODELS).failure("b").name == crashed
    ends = [run.end for run in runs_since(NOW - timedelta(minutes=1))]
    assert ends.count("Crashed") == 1 and "Promoted" in ends


def test_the_next_run_is_the_projects_own_and_neither_late_nor_cancelled(client, name: str):
    own, other = Deployed(client, name), Deployed(client, f"{name}-of-another-project")
    later = NOW + timedelta(hours=5)
    other.run(Scheduled(scheduled_time=NOW + timedelta(hours=1)))
    assert read(MODELS).next_run("a", NOW) == (None, f"schedule nightly of deployment {name} is paused")
    own.run(Scheduled(scheduled_time=NOW + timedelta(hours=2)), Cancelled())
    own.run(Scheduled(scheduled_time=NOW + timedelta(hours=3)), models=["b"])
    own.run(Scheduled(scheduled_time=later))
    late = own.run(Scheduled(scheduled_time=NOW - timedelta(hours=1)))
    found = read(MODELS)
    due, kept = found.next_run("a", NOW)
    assert due == later.strftime("%Y-%m-%dT%H:%M:%SZ") and kept is not None
    assert f"run {late} is Scheduled, and was due " in kept and "no worker takes runs at the moment" in kept
    assert found.next_run("b", NOW)[0] == (NOW + timedelta(hours=3)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_paused_deployment_is_told(client, name: str):
    Deployed(client, name, paused=True)
    assert read(MODELS).next_run("a", NOW) == (None, f"deployment {name} is paused")
