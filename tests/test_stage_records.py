"""What a stage ran with is kept beside its output, as it was when it ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lcmlora import __version__
from lcmlora.config import Config
from lcmlora.dvc_files import commits, stage_records
from lcmlora.project import Project
from lcmlora.stages import Run
from tests.support.releases import load_settings

DISTILL = Run("distill", "mini")


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(text: str) -> str:
    Path("code.py").write_text(text)
    git("add", "code.py")
    git("commit", "-q", "-m", text)
    return git("rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    commit("first")
    return Project()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_settings(tmp_path / "base")


def train(project: Project, config: Config, weights: str) -> None:
    """Makes an adapter as the stage does, and records it."""
    with stage_records.recorded(project, DISTILL, lambda: config):
        adapter = project.adapter("mini")
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "weights").write_text(weights)


def test_a_record_belongs_to_an_output_and_comes_back_with_it(project: Project, config: Config):
    first = git("rev-parse", "HEAD")
    train(project, config, "one")
    second = commit("second")
    Path("code.py").write_text("edited")
    train(project, config, "two")
    assert (stage_records.find(project, DISTILL, config)).git == commits.Commit(commit=second, dirty=True)
    (project.adapter("mini") / "weights").write_text("one")  # as DVC restores it from its cache
    found = stage_records.find(project, DISTILL, config)
    assert found and found.git == commits.Commit(commit=first, dirty=False)
    assert found.versions["lcmlora"] == __version__ and found.device.startswith("cpu")
    assert found.sections["distill"]["steps"] == config.distill_for("mini").steps
    (project.adapter("mini") / "weights").write_text("of another machine")
    assert stage_records.find(project, DISTILL, config) is None
    assert git("status", "--porcelain", "--untracked-files=no") == "M code.py"


def test_what_is_changed_while_a_stage_runs_is_told_and_recorded(
    project: Project, config: Config, capsys: pytest.CaptureFixture[str]
):
    first = git("rev-parse", "HEAD")
    steps = config.distill_for("mini").steps + 1
    edited = config.model_copy(update={"distill": config.distill | {"steps": steps}})
    settings = iter([config, edited])
    with stage_records.recorded(project, DISTILL, lambda: next(settings)):
        project.adapter("mini").mkdir(parents=True)
        second = commit("second")
    told = capsys.readouterr().err
    assert "models.mini.distill: its settings were changed while it ran" in told
    assert f"the project's commit was {first[:12]} when it began and is {second[:12]} now" in told
    found = stage_records.find(project, DISTILL, config)
    assert found and found.git.commit == first and len(found.changed) == 2
    assert found.sections["distill"]["steps"] == steps - 1


def test_a_run_that_goes_on_from_a_killed_one_of_another_commit_says_so(project: Project, config: Config):
    first = git("rev-parse", "HEAD")
    with pytest.raises(KeyboardInterrupt), stage_records.recorded(project, DISTILL, lambda: config):
        raise KeyboardInterrupt
    assert stage_records.find(project, DISTILL, config) is None
    commit("second")
    train(project, config, "one")
    found = stage_records.find(project, DISTILL, config)
    assert found and found.changed == [f"it may have gone on from an unfinished run of commit {first[:12]}"]
    train(project, config, "two")
    found = stage_records.find(project, DISTILL, config)
    assert found and found.changed == []


def test_a_damaged_file_of_records_is_told_and_begun_anew(
    project: Project, config: Config, capsys: pytest.CaptureFixture[str]
):
    file = project.records / "models.mini.distill.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    train(project, config, "one")
    assert "it is begun anew" in capsys.readouterr().err
    assert stage_records.find(project, DISTILL, config) is not None


def test_records_are_bounded(project: Project, config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage_records, "_MOST", 2)
    for number in range(4):
        train(project, config, str(number))
    assert (project.records / "models.mini.distill.json").read_text().count('"output"') == 2


def test_large_outputs_are_told_apart_by_both_ends(tmp_path: Path):
    digests = set()
    for content in (b"a" + bytes(3 << 20), bytes(3 << 20) + b"a", bytes(3 << 20), bytes(3 << 20) + b"aa"):
        (tmp_path / "weights").write_bytes(content)
        digests |= {stage_records.output_digest(tmp_path), stage_records.output_digest(tmp_path / "weights")}
    assert len(digests) == 8
