import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lcmlora.flows.monitoring import sources
from lcmlora.flows.monitoring.exporter import Exporter
from lcmlora.flows.report import leave_digest
from lcmlora.flows.retrain import retrain_models
from lcmlora.flows.status import status
from lcmlora.project import Project as Folder
from tests.flows.conftest import Project, artifacts
from tests.support.scraping import samples

ROOT = Path(__file__).parents[2]


def test_digest_status_and_metrics_tell_champions_events_runs_and_what_needs_a_person(project: Project, capsys):
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
    check_metrics(project)


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


def check_metrics(project: Project) -> None:
    """A scrape tells of champions, gate, runs, stages and disk."""
    (project.root / "scratch").mkdir()
    (project.root / "scratch/one").write_bytes(b"x" * 1000)
    (project.root / "scratch/same").hardlink_to(project.root / "scratch/one")
    made = Exporter(sources.sources(60), Folder().settings)
    assert made.look_at_all()
    found = samples(made)
    assert found["lcmlora_champion_excess"] == {("a", "4"): 4.5}
    assert found["lcmlora_champion_retrieval"] == {("a", "4"): 0.85}
    ((model, sha256, version),) = found["lcmlora_champion_info"]
    assert (model, sha256, version) == ("a", project.versions("a")[0].tags["sha256"][:12], "1")
    assert found["lcmlora_champion_promoted_timestamp_seconds"]["a",] > 1.7e9
    assert found["lcmlora_versions"] == {
        (gate, model): float((gate, model) == ("passed", "a")) for gate in ("passed", "rejected") for model in "ab"
    }
    assert found["lcmlora_newest_version_passed"] == {("a",): 1}
    assert found["lcmlora_training_running"] == {("a",): 0, ("b",): 0}
    assert found["lcmlora_runs_ended"]["Failed",] >= 1  # the server is that of all tests
    assert found["lcmlora_run_last_end_timestamp_seconds"]["Failed", "b"] > 1.7e9
    ran = {labels[1] for labels in found["lcmlora_stage_seconds"] if labels[0] == "a"}
    assert ran == {"prepare", "encode", "reference", "distill", "evaluate", "package"}
    assert found["lcmlora_stale_stages"] == {("a",): 0, ("b",): 3}
    assert found["lcmlora_kept_bytes"]["scratch",] == 1000
    assert 0 < found["lcmlora_disk_free_bytes"][()] < found["lcmlora_disk_size_bytes"][()]
    assert found["lcmlora_collection_success"] == {
        (name,): 1 for name in ("mlflow", "versions", "prefect", "dvc", "disk", "folders")
    }
