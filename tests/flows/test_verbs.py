"""Verbs of the command line that flows/ brings, called from outside the project's folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcmlora.cli.context import Context
from lcmlora.errors import UserError
from lcmlora.flows import command, serve, stack, verbs
from lcmlora.flows.background import StartedProcess
from lcmlora.tasks import processes
from tests.flows.conftest import Project

ROOT = Path(__file__).parents[2]


def call_for(folder: Path | None, params: Path | None = None) -> Any:
    """Returns the call of a verb with --project, and --params."""
    return SimpleNamespace(obj=Context.of(params, folder), command_path="lcmlora verb")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "some where else"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_watch_and_summary_work_in_the_project_that_is_named(
    project: Project, elsewhere: Path, capsys: pytest.CaptureFixture[str]
):
    project.change(lambda raw: raw["data"].update(source="folder", path="in"))
    project.change(lambda raw: raw["registry"].update(experiment=project.root.parent.name))
    (project.root / "in").mkdir()
    (project.root / "in" / "cat.txt").write_text("cat")
    verbs.watch(call_for(project.root))
    assert capsys.readouterr().out == "nothing has changed\n"
    assert Path.cwd() == project.root
    (project.root / "in" / "dog.txt").write_text("dog")
    os.chdir(elsewhere)
    verbs.watch(call_for(project.root))
    assert capsys.readouterr().out == "the data set at in has changed\n"
    os.chdir(elsewhere)
    verbs.summary(call_for(project.root), days=3)
    text = capsys.readouterr().out
    assert text.startswith("# The last 3 days\n") and "| a | none |" in text and "* b: prepare, encode@b" in text
    assert list(elsewhere.iterdir()) == []


def test_watch_tells_an_error_and_ends_with_1(project: Project, capsys: pytest.CaptureFixture[str]):
    project.change(lambda raw: raw["data"].update(source="folder", path="no-such-folder"))
    with pytest.raises(SystemExit) as ended:
        verbs.watch(call_for(None))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: no-such-folder: ")


def test_what_a_verb_cannot_work_with_is_told_before_anything_is_started(
    project: Project, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(
        UserError, match=r"^params\.yaml: no such file; run in the project's folder or name it with --p"
    ):
        command.run(call_for(None))
    other = project.root / "other.yaml"
    with pytest.raises(
        UserError, match=r"^--params: the stages of a run read .*project/params\.yaml; name the project"
    ):
        command.run(call_for(None, other))
    with pytest.raises(UserError, match=r"^unknown model 'nope': params\.yaml `models` has a, b"):
        command.run(call_for(project.root), ["a", "nope"])
    with pytest.raises(UserError, match=r"^--publish and --no-publish exclude each other"):
        command.run(call_for(project.root), publish="here", no_publish=True)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    os.chdir(elsewhere)
    with pytest.raises(UserError, match=r"^PREFECT_API_URL is not set: schedules need a server"):
        serve.schedule(call_for(project.root))
    (project.root / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"^dvc\.yaml: no such file; `lcmlora init` makes a project with it"):
        command.run(call_for(project.root))


def test_servers_that_run_and_are_not_asked_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    verbs.note_unused_servers()
    (tmp_path / ".up").mkdir()
    state = stack.State(started={"prefect": StartedProcess(pid=1, digest="")})
    stack._save(tmp_path / ".up", stack.State())
    verbs.note_unused_servers()
    assert capsys.readouterr().err == ""
    stack._save(tmp_path / ".up", state)
    verbs.note_unused_servers()
    assert "`source .up/environment` names them" in capsys.readouterr().err
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    for folder, told in ((tmp_path, ""), (tmp_path / "other", "that project's servers are used")):
        monkeypatch.setenv("LCMLORA_SERVERS", str(folder / ".up"))
        verbs.note_unused_servers()
        assert told in (error := capsys.readouterr().err) and bool(told) == bool(error)


def test_every_verb_is_declared_where_it_is_and_has_a_module_that_imports_nothing_heavy():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["lcmlora.verbs"]
    for name, value in entries.items():
        assert callable(EntryPoint(name, value, "lcmlora.verbs").load()), name
    modules = sorted({value.partition(":")[0] for value in entries.values()})
    probe = f"import sys, {', '.join(modules)}\n"
    probe += "print({'prefect', 'torch', 'mlflow', 'dvc', 'pydantic', 'psutil'} & set(sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", probe], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "set()", ended.stderr


@pytest.mark.parametrize("module", ["retrain", "stack", "serve", "status", "watch", "report", "promote"])
def test_every_entry_point_of_flows_prints_its_help_before_prefect_is_imported(module: str, tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"flows.{module}", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0
    assert f"Usage: python -m flows.{module} " in ended.stdout
    assert not re.search(r"\| +(prefect|mlflow|torch|dvc)$", ended.stderr, re.M)


def test_stages_find_the_commands_of_this_installation_first(tmp_path: Path):
    own = str(Path(sys.executable).parent)
    assert processes.search_path({"PATH": "/usr/bin:/bin"}).split(os.pathsep) == [own, "/usr/bin", "/bin"]
    # `pip install --user` puts commands into another folder than that of the interpreter.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "lcmlora").touch()
    probe = "from lcmlora.tasks.processes import search_path; print(search_path({'PATH': '/bin'}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUSERBASE": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip().split(os.pathsep) == [own, str(tmp_path / "bin"), "/bin"]


def test_a_projects_files_that_are_named_as_packages_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("dvc", "tasks", "flows", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    made = processes.python("dvc", "--version")
    ended = subprocess.run(made.arguments, env=made.environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
