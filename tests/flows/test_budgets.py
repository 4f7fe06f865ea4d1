"""A model's monthly budget: scheduled runs stop, runs by hand go on, and people are told once."""

import base64
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from lcmlora.config import Config, load
from lcmlora.flows import budgets, notify
from lcmlora.flows.outcomes import Outcome
from lcmlora.flows.retrain import retrain_models
from lcmlora.settings.services import Costs
from lcmlora.tasks import costs
from tests.flows.conftest import Project
from tests.support.releases import load_settings


def spend(model: str, seconds: float) -> None:
    costs._append(costs.Entry(costs._now(), model, f"distill@{model}", "cpu", seconds, None))


@pytest.fixture
def settings(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    budget = Costs(per_hour={"cpu": 1.0}, budget=2.0)
    return load_settings(base_folder, models=("a", "b")).model_copy(update={"costs": budget})


def test_a_scheduled_run_stops_past_the_budget_and_tells_once_and_one_by_hand_goes_on_with_a_warning(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    told: list[notify.Event] = []
    monkeypatch.setattr(notify, "send", lambda event, settings: told.append(event))
    scheduled = True
    monkeypatch.setattr(budgets, "is_scheduled", lambda: scheduled)
    spend("a", 7199)
    outcome = Outcome("a")
    assert not budgets.leave_to_a_person(outcome, settings)
    spend("a", 1)
    assert [budgets.leave_to_a_person(outcome, settings) for _ in range(2)] == [True, True]
    assert outcome.end == "OverBudget" and outcome.over_budget is not None
    assert outcome.over_budget.startswith("2.00 of 2.00 EUR are spent in 20")
    assert "`lcmlora run a`" in outcome.over_budget
    assert [(event.kind, event.model, event.figures["spent"]) for event in told] == [("budget", "a", 2.0)]
    assert not budgets.leave_to_a_person(Outcome("b"), settings)
    scheduled = False
    assert not budgets.leave_to_a_person(Outcome("a"), settings)
    assert "warning: a: 2.00 of 2.00 EUR are spent" in capsys.readouterr().err


@flow(name="who-started-me")
def who() -> bool:
    return budgets.is_scheduled()


def test_a_run_of_an_automation_counts_as_scheduled_and_one_by_hand_does_not(prefect: None):
    assert who() is False
    deployment = who.to_deployment("by-event")
    with get_client(sync_client=True) as client:
        identity = client.create_flow_from_name(who.name)
        made = client.create_deployment(flow_id=identity, name=deployment.name)
        name = base64.b64encode(b"lcmlora: retrain").decode()
        headers = {"prefect-automation-id": str(uuid4()), "prefect-automation-name": name}
        answer = client._client.post(f"/deployments/{made}/create_flow_run", json={}, headers=headers)
        run = client.read_flow_run(answer.json()["id"])
    assert run_flow(who, flow_run=run) is True


@pytest.mark.slow
def test_a_flow_past_the_budget_trains_nothing_by_schedule_and_a_version_has_its_costs(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    project.change(lambda raw: raw.update(costs={"per_hour": {"cpu": 3600.0}, "budget": 1000.0}))
    retrain_models(["a"])
    tags = project.versions("a")[0].tags
    assert float(tags["device_seconds"]) > 0 and tags["price"].endswith(" EUR")
    assert float(tags["price"].split()[0]) == pytest.approx(float(tags["device_seconds"]), abs=0.051)  # 1 EUR a second
    assert costs.uncounted("a") == []
    retrain_models(["a"])  # nothing is stale, nothing is spent
    assert [entry.version for entry in costs.entries()] == ["lcm-lora-a/1"] * len(costs.entries())
    spend("a", 1000)
    monkeypatch.setattr(budgets, "is_scheduled", lambda: True)
    (project.root / "pictures").write_text('{"more": 1}\n')
    state = retrain_models(["a"], return_state=True)
    assert (state.name, project.distilled()) == ("OverBudget", ["a"])
    monkeypatch.setattr(budgets, "is_scheduled", lambda: False)
    state = retrain_models(["a"], return_state=True)
    assert (state.name, project.distilled()) == ("Reproduced", ["a", "a"])
    assert costs.budget_of("a", load()).is_spent
