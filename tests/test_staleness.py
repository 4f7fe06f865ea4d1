"""What makes a stage stale: real DVC on the project's own dvc.yaml, with stages that are done in a moment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.exceptions import ReproductionError
from dvc.repo import Repo

import lcmlora.project
from lcmlora.dvc_files import dvc_yaml
from tests.support import repositories

ROOT = Path(__file__).parents[1]

# Resolving is real. Every other verb writes, as each output, a digest of the inputs and settings that dvc.yaml names.
LCMLORA = """\
import hashlib, os, pathlib, runpy, sys
import yaml
name, _, model = os.environ["DVC_STAGE"].partition("@")
if name == "resolve":
    runpy.run_module("lcmlora", run_name="__main__")
    sys.exit()
text = pathlib.Path("dvc.yaml").read_text().replace("${item.model}", model).replace("${data.path}", "package-lock.json")
stage = yaml.safe_load(text)["stages"][name]
digest = hashlib.sha256()
for dep in stage["deps"]:
    path = pathlib.Path(dep)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if file.is_file() else b"")
settings = yaml.safe_load(pathlib.Path("resolved.yaml").read_text())
for key in stage["params"][0]["resolved.yaml"][0].split("."):
    settings = settings[key]
digest.update(repr(settings).encode())
for out in (*stage.get("outs", ()), *stage.get("metrics", ()), *stage.get("plots", ())):
    path = pathlib.Path(out if isinstance(out, str) else list(out)[0])
    file = path if path.suffix else path / "made"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(digest.hexdigest())
"""


class Project:
    """The project with a copy of the package, all of whose stages are up to date."""

    def __init__(self, root: Path) -> None:
        self.root = repositories.make(root, (ROOT / "dvc.yaml").read_text())
        self.package = root / "site" / "lcmlora"
        shutil.copytree(ROOT / "lcmlora", self.package, ignore=shutil.ignore_patterns("__pycache__", "emoji"))
        (root / "bin").mkdir()
        (root / "bin" / "lcmlora").write_text(f"#!{sys.executable}\n{LCMLORA}")
        (root / "bin" / "lcmlora").chmod(0o755)
        for name in ("params.yaml", "package-lock.json"):
            shutil.copy(ROOT / name, root)
        for name in ("bases/emoji", "study", "compatibility"):
            (root / name).mkdir(parents=True)
            (root / name / "file").write_text(name)
        self._environment = {
            "DVC_NO_ANALYTICS": "1",
            "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(root / "site"),
        }
        self.repro("resolve")
        with self.dvc() as repo:
            repo.commit("pretrain", force=True)
        self.repro()

    @contextmanager
    def dvc(self) -> Iterator[Repo]:
        """DVC in this process, since importing it takes a second."""
        with pytest.MonkeyPatch.context() as patch, Repo(str(self.root)) as repo:
            patch.chdir(self.root)
            for name, value in self._environment.items():
                patch.setenv(name, value)
            yield repo

    def repro(self, *stages: str) -> set[str]:
        """Runs what is stale, or these stages alone, and returns the names of those that ran besides `resolve`."""
        with self.dvc() as repo:
            ran = {stage.name for stage in repo.reproduce(stages or None, single_item=bool(stages))}
        assert "resolve" in ran
        return {name.split("@")[0] for name in ran} - {"resolve"}

    def status(self) -> dict[str, Any]:
        with self.dvc() as repo:
            found: dict[str, Any] = repo.status()
        assert found.pop("resolve") == ["always changed"]
        return found

    def edit(self, module: str, change: Callable[[str], str]) -> None:
        path = self.package / module
        before = path.read_text()
        path.write_text(change(before))
        assert path.read_text() != before


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    assert project.repro() == set() and project.status() == {}
    return project


def test_a_comment_a_rename_and_a_moved_module_make_nothing_stale(project: Project):
    project.edit("data/latents/encode.py", lambda text: "# A comment.\n" + text.replace("_take_over", "_adopt"))
    (project.package / "data/latents/encode.py").rename(project.package / "data/moved.py")
    assert project.repro() == set()
    assert project.status() == {}


def test_a_version_that_is_raised_makes_its_stage_and_all_after_it_stale(project: Project):
    project.edit("stages.py", lambda text: text.replace('"encode": 1', '"encode": 2'))
    assert project.status() == {}  # nobody has resolved yet: DVC asks by itself when it is to run
    project.repro("resolve")
    changed = {"changed deps": {"resolved.yaml": {"models.emoji.encode": "modified"}}}
    assert project.status() == {"encode@emoji": [changed]}
    assert project.repro() == {"encode", "distill", "evaluate", "package"}
    assert project.status() == {}


def test_a_default_of_the_package_that_changes_makes_the_stages_stale_that_it_decides(project: Project):
    assert "gamma" not in (project.root / "params.yaml").read_text()
    project.edit("settings/training.py", lambda text: text.replace("gamma: Share = 0.3", "gamma: Share = 0.4"))
    assert project.repro() == {"distill", "evaluate", "package"}


def test_data_of_its_own_for_one_model_leave_the_stages_of_the_others_up_to_date(
    project: Project, capfd: pytest.CaptureFixture
):
    opened = lcmlora.project.Project(project.root)
    before = [(path, path.read_text()) for path in (opened.params_file, opened.dvc_yaml)]
    raw = yaml.safe_load(opened.params_file.read_text())
    raw["models"].append("other")
    raw["bases"]["other"] = raw["bases"]["emoji"] | {"data": {"path": "bases/emoji"}}
    opened.params_file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ReproductionError, match="failed to reproduce 'resolve'"):
        project.repro()
    assert "dvc.yaml: prepare-own: has no model, and params.yaml has other: bases/emoji" in capfd.readouterr().err
    assert dvc_yaml.refresh(opened.settings(), opened)
    project.repro("resolve")
    stages = ("prepare-own", "encode", "reference", "distill", "evaluate", "package")
    assert project.status().keys() == {f"{stage}@other" for stage in stages}
    for path, text in before:
        path.write_text(text)
    project.repro("resolve")
    assert project.status() == {}


def test_dvc_alone_sees_a_change_of_params_yaml_and_what_decides_nothing_makes_nothing_stale(
    project: Project, capfd: pytest.CaptureFixture
):
    path = project.root / "params.yaml"
    path.write_text(path.read_text() + "\ndistill: {device: cpu, log_every: 20}\n")
    assert project.repro() == set()
    path.write_text(path.read_text() + "\nevaluation: {teacher_steps: 40}\n")
    assert project.repro() == {"reference", "evaluate", "package"}
    before = (project.root / "resolved.yaml").read_text()
    path.write_text(path.read_text().replace("teacher_steps: 40", "teacher_steps: many"))
    with pytest.raises(ReproductionError, match="failed to reproduce 'resolve'"):
        project.repro()
    assert "error: params.yaml: evaluation.teacher_steps: got 'many'" in capfd.readouterr().err
    assert (project.root / "resolved.yaml").read_text() == before
