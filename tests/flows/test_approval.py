"""A run that needs a person's approval: it ends, and the person decides from a terminal or from Prefect's page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lcmlora import config
from lcmlora.cli.main import app
from lcmlora.flows.promote import approve_version, reject_version
from lcmlora.flows.retrain import retrain_models
from lcmlora.flows.watch import watch_inputs
from lcmlora.registry import promotion
from tests.flows.conftest import Project, artifacts


def channel(project: Project, model: str) -> Path:
    return project.root / f"releases/{model}/channels/champion.json"


@pytest.mark.slow
def test_a_run_ends_and_the_version_waits_until_a_person_says_yes_or_no(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    project.change(lambda raw: raw["gate"].update(approval="required"))
    state = retrain_models(return_state=True)
    assert (state.is_completed(), state.name) == (True, "AwaitingApproval")
    assert state.message.startswith("a: AwaitingApproval lcm-lora-a/1; b: AwaitingApproval lcm-lora-b/1; ")
    assert "awaits approval since" in capfd.readouterr().out
    assert project.aliases("a") == project.aliases("b") == {} and not channel(project, "a").exists()
    assert len(project.releases()) == 2  # published, and no channel points there
    page = artifacts("approval-a")[-1].data
    assert (
        "# lcm-lora-a/1 waits for a person" in page
        and "evaluations | student 4.5, " in page
        and "Figures, card and report: " in page
    )
    assert "](data:image/png;base64," in page and "`lcmlora approve lcm-lora-a/1 --reason ...`" in page
    state = retrain_models(return_state=True)  # the next night
    assert state.name == "UpToDate" and project.aliases("a") == {}

    called = CliRunner().invoke(app, ["approve", "a/1", "--reason", "sharp", "--by", "ada"], catch_exceptions=False)
    assert called.exit_code == 0 and "lcm-lora-a@champion is lcm-lora-a/1, " in called.output
    assert project.aliases("a") == {"champion": 1}
    assert json.loads(channel(project, "a").read_text())["sha256"] == project.versions("a")[0].tags["sha256"]
    state = reject_version("b/1", "blurred", "bob", return_state=True)
    assert (state.name, state.message) == ("Rejected", "lcm-lora-b/1: rejected by bob: blurred")
    state = retrain_models(["b"], force=True, return_state=True)
    assert state.name == "Reproduced" and project.aliases("b") == {} and not channel(project, "b").exists()
    assert "approval rejected by bob on" in capfd.readouterr().out
    history = promotion.history("lcm-lora-b", config.load().registry)
    assert [(e.action, e.who) for e in history][3:] == [("approval rejected", "bob")]


def test_an_approval_from_prefects_page_promotes_and_one_that_nobody_gives_ends_at_a_look(project: Project):
    project.change(lambda raw: raw["gate"].update(approval=["a", "b"]))
    assert retrain_models(return_state=True).name == "AwaitingApproval"
    state = approve_version("a/1", "sharp", "ada", return_state=True)
    assert state.name == "Promoted" and state.message.startswith("lcm-lora-a@champion is lcm-lora-a/1, ")
    assert project.aliases("a") == {"champion": 1} and channel(project, "a").is_file()
    assert "| ada |" in artifacts("history-lcm-lora-a")[-1].data
    project.change(lambda raw: raw["gate"].update(approval_days=1e-9))
    watch_inputs(return_state=True)
    history = promotion.history("lcm-lora-b", config.load().registry)
    assert (history[-1].action, history[-1].reason) == ("approval timed out", "nobody decided within 1e-09 days")
    state = approve_version("b/1", "sharp", "ada", return_state=True)
    assert state.is_failed() and "approval timed out" in state.message
