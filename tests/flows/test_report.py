import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lcmlora.flows.report import leave_digest
from lcmlora.flows.retrain import retrain_models
from lcmlora.flows.status import status
from tests.flows.conftest import Project, artifacts

ROOT = Path(__file__).parents[2]


def test_digest_and_status_tell_champions_events_runs_and_what_needs_a_person(project: Project, capsys):
    (project.root / "broken-b").touch()
    retrain_models(return_state=True)
    state = leave_digest(return_state=True)
    assert (state.is_completed(), state.name) == (True, "Reported")
    text = artifacts("digest")[-1].data
    assert "| a | lcm-lora-a/1 | 20" in text
    assert "| 4.5 | 0.85 | " in text
    assert "| b | none |" in text
    assert "| a | /1 | promoted |" in text
    assert "b: distill@b: step 7: the loss is not finite" in text  # under what needs a person
    assert "* b: distill@b, evaluate@b, package@b stale" in text
    check_status(project, capsys)


def check_status(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Each model has its line, and without a server it is said what is not known."""
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(project.root / "prefect"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lcmlora", "status", "--json"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "PREFECT_API_URL is not set" in shown.stderr
    found = json.loads(shown.stdout)
    assert [(each["model"], each["champion"], each["due"]) for each in found] == [
        ("a", "lcm-lora-a/1", None),
        ("b", None, None),
    ]
    assert found[0]["stale"] == [] and "distill@b" in found[1]["stale"]
    assert found[0]["figures"] == {"excess": 4.5, "retrieval": 0.85}
    capsys.readouterr()
    status(SimpleNamespace(obj=None))  # with the tests' server
    table = capsys.readouterr().out
    assert "lcm-lora-a/1" in table and "Failed" in table
