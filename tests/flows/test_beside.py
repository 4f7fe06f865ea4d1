"""Beside others: a second run in the same folder, `status` while a stage runs, and a DVC remote that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcmlora.flows.retrain import retrain_models
from tests.flows.conftest import Project
from tests.tasks.test_processes import wait_for
from tests.tasks.test_remote import closed_port

ROOT = Path(__file__).parents[2]
WAITING = 'echo "$1" >> distilled; touch begun; while test ! -e go; do sleep 0.1; done; mkdir -p adapters\n'


def start(project: Project, module: str, *arguments: str, home: str) -> subprocess.Popen[str]:
    """Starts a verb in a process of its own, with a Prefect of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment | {"PREFECT_HOME": str(project.root / home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_runs_in_one_folder_do_the_work_once_and_status_says_what_runs(project: Project):
    (project.root / "distill.sh").write_text(WAITING + "cp -r stock/adapters/$1 adapters\n")
    first = start(project, "flows.retrain", "a", home="first")
    wait_for(lambda: (project.root / "begun").exists() or first.poll() is not None, 300)
    assert first.poll() is None, first.communicate()
    second = start(project, "flows.retrain", "a", home="second")

    shown = start(project, "flows.status", "--json", home="third")
    out, err = shown.communicate(timeout=120)
    assert shown.returncode == 0, err
    (running,) = json.loads(out)[0]["running"]
    assert running["stage"] == "distill@a" and running["since"] and running["run"]
    assert json.loads(out)[0]["stale"] == [] and json.loads(out)[0]["undecided"] == ["evaluate@a", "package@a"]

    assert second.stderr is not None
    said: list[str] = []
    while not any("waiting for" in line for line in said):
        said.append(second.stderr.readline())
        assert said[-1], said  # else it has ended
    assert f"held by process {first.pid} " in said[-1]
    (project.root / "go").touch()
    errors = [first.communicate(timeout=300)[1], second.communicate(timeout=300)[1]]
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert project.distilled() == ["a"]
    assert [version.version for version in project.versions("a")] == [1]
    assert len(project.releases()) == 1


@pytest.mark.slow
def test_a_remote_that_is_down_stops_no_computing_and_gets_the_results_when_it_is_back(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "somebody")
    endpoint = f"    endpointurl = http://127.0.0.1:{closed_port()}\n"
    config = project.root / ".dvc/config"
    config.write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    url = s3://bucket/dvc\n{endpoint}")
    project.change(lambda raw: raw["flow"].update(retries=1))
    state = retrain_models(["a"], return_state=True)
    assert (state.is_completed(), state.name) == (True, "NotPushed")
    assert state.message is not None
    assert state.message.startswith(
        "a: Promoted lcm-lora-a/1; results are on this machine alone, and the next run sends"
    )
    assert "Could not connect to the endpoint URL" in state.message
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: DVC's remote")]
    assert len(warnings) == 1

    (tmp_path / "remote").mkdir()
    config.write_text(f"[core]\n    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'remote'}\n")
    assert retrain_models(["a"], return_state=True).name == "UpToDate"
    assert any((tmp_path / "remote" / "files").rglob("*.dir")) and any((tmp_path / "remote" / "runs").iterdir())
