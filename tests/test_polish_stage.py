"""Stage `polish`: its place among the stages of a project, which follows `distill.polish`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from typer.testing import CliRunner

from flows.retrain import stages_of
from lcmlora import config, stages
from lcmlora.cli.main import app
from lcmlora.dvc_files import dvc_yaml, resolved
from lcmlora.errors import UserError
from lcmlora.project import Project
from lcmlora.stages import Run
from tests.support import params

ROOT = Path(__file__).parents[1]
POLISH = {"steps": 50}


def load(root: Path, polished: dict[str, dict[str, Any] | None]) -> config.Config:
    """Writes params.yaml for these models and returns the settings."""
    raw = params.raw() | {"models": list(polished)}
    emoji = raw["bases"].pop("emoji")
    raw["bases"] = {
        model: emoji | {"distill": emoji.get("distill", {}) | ({"polish": polish} if polish else {})}
        for model, polish in polished.items()
    }
    (root / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return config.load(root / "params.yaml")


def planned(root: Path) -> dict[str, tuple[str, set[str], set[str]]]:
    """Returns of each stage what DVC makes of dvc.yaml: command, files that it reads, outputs."""
    with Repo(str(root)) as repo:
        return {
            stage.name: (
                str(stage.cmd),
                {dep.def_path for dep in stage.deps if dep.def_path != "resolved.yaml"},
                {out.def_path for out in stage.outs},
            )
            for stage in repo.index.stages
        }


@pytest.fixture
def project(tmp_path: Path) -> Project:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    Repo.init(str(tmp_path), no_scm=True).close()
    return Project(tmp_path)


def test_a_polished_model_is_distilled_to_a_folder_of_its_own_and_others_stay_as_they_are(project: Project):
    plain = load(project.root, {"a": None, "b": None})
    resolved.refresh(plain, project.resolved)
    before = planned(project.root)
    settings = load(project.root, {"a": POLISH, "b": None})
    with pytest.raises(UserError, match=r"polish: reads no model, and the models with distill.polish are a: "):
        dvc_yaml.check(settings, project)
    assert dvc_yaml.refresh(settings, project) and not dvc_yaml.refresh(settings, project)
    resolved.refresh(settings, project.resolved)
    after = planned(project.root)

    assert after.pop("polish@a") == (
        "lcmlora polish --model a",
        {"distilled/a", "data/latents/a", "bases/a", "data/pictures"},
        {"adapters/a"},
    )
    command, read, _ = before.pop("distill@a")
    assert after.pop("distill@a") == (command, read, {"distilled/a"})
    assert after == before
    assert project.dvc_yaml.read_text() == dvc_yaml.whole(settings, pretrain=True)
    assert project.distilled("a", settings) == project.root / "distilled" / "a"
    assert project.distilled("b", settings) == project.adapter("b")


def test_without_it_dvc_yaml_is_as_it_was_and_own_changes_of_distill_stay(project: Project):
    original = project.dvc_yaml.read_text()
    assert dvc_yaml.refresh(load(project.root, {"a": POLISH}), project)
    assert dvc_yaml.refresh(load(project.root, {"a": None}), project)
    assert project.dvc_yaml.read_text() == original

    own = original.replace("    cmd: lcmlora distill ${item}\n", "    cmd: lcmlora distill ${item}\n    desc: ours\n")
    project.dvc_yaml.write_text(own)
    changed = load(project.root, {"a": None}).model_copy(update={"study": None})
    assert dvc_yaml.refresh(changed, project)
    assert "    desc: ours\n" in project.dvc_yaml.read_text()


def test_its_settings_decide_the_polish_alone(project: Project):
    def entries(polish: dict[str, Any] | None) -> dict[str, Any]:
        settings = load(project.root, {"a": polish})
        return {run.stage: stages.decisive_settings(settings, run) for run in stages.runs(settings)}

    without, one, other = entries(None), entries(POLISH), entries(POLISH | {"w": 2.0})
    assert one.keys() - without.keys() == {"polish"}
    assert {stage for stage in without if without[stage] != one[stage]} == set()
    assert {stage for stage in one if one[stage] != other[stage]} == {"polish"}


def test_a_change_of_the_distillation_or_of_how_weights_are_chosen_makes_it_stale(project: Project):
    settings = load(project.root, {"a": POLISH})
    run = Run("polish", "a")
    before = stages.decisive_settings(settings, run)
    for section, change in (("distill", {"w_min": 1.0}), ("evaluation", {"choosing_pictures": 64})):
        base = settings.bases["a"]
        changed = base.model_copy(update={section: getattr(base, section) | change})
        other = settings.model_copy(update={"bases": settings.bases | {"a": changed}})
        assert stages.decisive_settings(other, run) != before, section


def test_the_flow_runs_it_after_the_distillation(project: Project):
    settings = load(project.root, {"a": POLISH, "b": None})
    assert stages_of("a", settings)[2:5] == ["distill@a", "polish@a", "evaluate@a"]
    assert "polish@b" not in stages_of("b", settings)


def test_the_verb_says_what_is_missing(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project.root)
    load(project.root, {"a": None})
    refused = CliRunner().invoke(app, ["polish", "a"]).exception
    assert isinstance(refused, UserError) and "a: distill.polish: is missing in params.yaml" in str(refused)
    load(project.root, {"a": POLISH})
    refused = CliRunner().invoke(app, ["polish", "a"]).exception
    assert "distilled/a: holds no distilled adapter; run `lcmlora distill a` first" in str(refused)
