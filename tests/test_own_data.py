"""Two models that learn from different pictures: settings, dvc.yaml, DVC's plan, and real prepare and encode."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from typer.testing import CliRunner, Result

from lcmlora import config
from lcmlora.cli.main import app
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.sources.source import read_records
from lcmlora.dvc_files import dvc_yaml, resolved
from lcmlora.errors import UserError
from lcmlora.project import Project
from tests.data.conftest import add, picture
from tests.support import params, projects, repositories

ROOT = Path(__file__).parents[1]
ANIMALS = {"groups": ["animals-nature"], "styles": ["noto"], "copies": 2}


def load(root: Path, own: dict[str, dict[str, Any]], models: tuple[str, ...] = ("a", "b")) -> config.Config:
    """Writes params.yaml for models of which some have data of their own, and returns the settings."""
    raw = params.raw() | {"models": list(models)}
    emoji = raw["bases"].pop("emoji")
    raw["bases"] = {model: emoji | {"data": own.get(model, {})} for model in models}
    (root / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return config.load(root / "params.yaml")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    return Project(tmp_path)


def planned(root: Path) -> dict[str, tuple[str, set[str], set[str]]]:
    """Returns of each stage that prepares or reads pictures what DVC makes of dvc.yaml: command, inputs, outputs."""
    found = {}
    with Repo(str(root)) as repo:
        for stage in repo.index.stages:
            if stage.name.split("@")[0] in ("prepare", "prepare-own", "encode", "reference", "evaluate"):
                settings = [str(dep.params) for dep in stage.deps if isinstance(dep, ParamsDependency)]
                files = [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]
                found[stage.name] = (str(stage.cmd), {*settings, *files}, {out.def_path for out in stage.outs})
    return found


def test_a_base_changes_the_data_of_the_project_key_by_key(tmp_path: Path):
    settings = load(tmp_path, {"b": {"path": "more.json", "min_side": 32}})
    shared, own = settings.data_for("a"), settings.data_for("b")
    assert shared is settings.data
    assert own == shared.model_copy(update={"path": "more.json", "min_side": 32})
    assert settings.models_sharing_data() == ["a"]
    opened = Project(tmp_path)
    assert opened.pictures_of("a", settings) == opened.pictures == tmp_path / "data/pictures"
    assert opened.pictures_of("b", settings) == tmp_path / "data/own-pictures/b"


def test_a_mistake_in_the_data_of_a_base_names_its_key(tmp_path: Path):
    with pytest.raises(UserError, match=r"bases\.b\.data\.min_sides: there is no such key"):
        load(tmp_path, {"b": {"min_sides": 32}})
    with pytest.raises(UserError, match=r"bases\.b\.data\.copies: got 0: Input should be greater than 0"):
        load(tmp_path, {"b": {"copies": 0}})


def test_resolved_settings_of_other_models_stay_and_each_model_has_its_own_data(tmp_path: Path):
    before = resolved.resolve(load(tmp_path, {}))
    after = resolved.resolve(load(tmp_path, {"b": {"source": "prompts", "path": "prompts.txt"}}))
    assert (after["prepare"], after["models"]["a"]) == (before["prepare"], before["models"]["a"])
    own = after["models"]["b"]
    assert (own["prepare"]["data"]["source"], own["encode"]["data"]["source"]) == ("prompts", "prompts")
    assert own["reference"]["data"] == own["evaluate"]["data"] == {"source": "prompts"}
    everybody = resolved.resolve(load(tmp_path, {"a": ANIMALS, "b": ANIMALS}))
    assert "prepare" not in everybody and "prepare" in everybody["models"]["a"]


def test_where_no_model_has_data_of_its_own_dvc_yaml_stays_as_it_came(project: Project):
    before = project.dvc_yaml.read_bytes()
    settings = load(project.root, {})
    dvc_yaml.check(settings, project)
    assert not dvc_yaml.refresh(settings, project)
    assert project.dvc_yaml.read_bytes() == before
    # The stages that come with the package are those of this project.
    assert all(block in before.decode() for block in dvc_yaml._wanted(settings).values())


def test_both_forms_of_dvc_yaml_are_the_same_stages_for_a_model_without_data_of_its_own(tmp_path: Path):
    root = repositories.make(tmp_path / "project", (ROOT / "dvc.yaml").read_text())
    load(root, {})
    shared = planned(root)
    assert dvc_yaml.refresh(load(root, {"b": {"path": "more.json"}}), Project(root))
    apart = planned(root)
    of_a = [f"{stage}@a" for stage in ("encode", "reference", "evaluate")]
    assert {name: apart[name] for name in of_a} == {name: shared[name] for name in of_a}
    assert apart["prepare"] == shared["prepare"]
    command, inputs, outputs = apart["prepare-own@b"]
    assert (command, inputs, outputs) == (
        "lcmlora prepare --model b",
        {"more.json", "['models.b.prepare']"},
        {"data/own-pictures/b"},
    )
    for stage in ("encode", "reference", "evaluate"):
        before, after = shared[f"{stage}@b"], apart[f"{stage}@b"]
        assert (after[0], after[2]) == (before[0], before[2])
        assert after[1] == before[1] - {"data/pictures"} | {"data/own-pictures/b"}


def test_dvc_yaml_follows_params_yaml_and_keeps_everything_else(project: Project):
    own = project.dvc_yaml.read_text().replace(
        "  prepare:\n", "  # Mine.\n  mine:\n    cmd: echo ${models}\n\n  prepare:\n"
    )
    own = own.replace("  style:\n", "  # Of artists.\n  style:\n")
    project.dvc_yaml.write_text(own)
    settings = load(project.root, {"b": {"path": "more.json"}})
    with pytest.raises(UserError, match=r"prepare-own: has no model, and params\.yaml has b: more\.json; run `lcmlora"):
        dvc_yaml.check(settings, project)
    assert dvc_yaml.refresh(settings, project) and not dvc_yaml.refresh(settings, project)
    dvc_yaml.check(settings, project)
    assert "  # Mine.\n  mine:\n" in project.dvc_yaml.read_text()
    assert "  # Of artists.\n  style:\n" in project.dvc_yaml.read_text()
    # Another model, another path, all with data of their own: each must be written.
    changes = ({"b": {"path": "other.json"}}, {"a": ANIMALS, "b": {"path": "other.json"}})
    for changed in (
        load(project.root, {"b": {"path": "more.json"}}, ("a", "b", "c")),
        *(load(project.root, c) for c in changes),
    ):
        assert dvc_yaml.refresh(changed, project)
        dvc_yaml.check(changed, project)
    assert "prepare" not in yaml.safe_load(project.dvc_yaml.read_text())["stages"]
    assert dvc_yaml.refresh(load(project.root, {}), project)
    assert project.dvc_yaml.read_text() == own


def test_a_dvc_yaml_of_another_layout_is_left_alone_with_a_clear_line(project: Project):
    raw = yaml.safe_load(project.dvc_yaml.read_text())
    project.dvc_yaml.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="cannot be rewritten, since it is not laid out as the one that comes with"):
        dvc_yaml.refresh(load(project.root, {"b": {"path": "more.json"}}), project)
    assert json.loads(project.dvc_yaml.read_text()) == raw


def test_names_that_yaml_would_read_as_numbers_stay_names(tmp_path: Path):
    root = repositories.make(tmp_path / "project", (ROOT / "dvc.yaml").read_text())
    dvc_yaml.refresh(load(root, {"1.5": {"path": "more: #1.json"}}, ("1.5", "2e3")), Project(root))
    found = planned(root)
    assert "more: #1.json" in found["prepare-own@1.5"][1]
    assert "data/own-pictures/1.5" in found["encode@1.5"][1] and "data/pictures" in found["encode@2e3"][1]


@pytest.fixture
def pictures(miniatures: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of two models, the second of which learns from a folder of its own."""
    root = tmp_path / "project"
    raw = projects.make(root, miniatures, "sqlite:///mlflow.db", "sd15", "ssd1b")
    for number in range(8):
        add(root / "large", f"{number}.png", f"thing {number}", picture(50 + number))
    raw["bases"]["ssd1b"]["data"] = {"path": "large"}
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    shutil.copy(ROOT / "dvc.yaml", root)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    return Project(root)


def run(project: Project, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--project", str(project.root), *arguments], catch_exceptions=False)


def test_each_model_is_prepared_and_encoded_from_its_own_pictures(pictures: Project, monkeypatch: pytest.MonkeyPatch):
    assert "ssd1b: " in (told := run(pictures, "check").stdout) and told.count("pictures of its own at large") == 1
    run(pictures, "resolve")
    dvc_yaml.check(pictures.settings(), pictures)
    run(pictures, "prepare")
    run(pictures, "prepare", "--model", "ssd1b")  # as DVC calls it
    with pytest.raises(UserError, match=r"bases\.sd15\.data: is missing"):
        run(pictures, "prepare", "sd15")
    captions = {}
    for model in ("sd15", "ssd1b"):
        run(pictures, "fetch", model)
        run(pictures, "encode", model)
        folder = pictures.pictures_of(model, pictures.settings())
        records = read_records(folder / "train.jsonl")
        assert len(LatentCache(pictures.latents(model))) == len(records)
        captions[model] = {record.caption.split()[0] for record in records}
    assert captions == {"sd15": {"subject"}, "ssd1b": {"thing"}}
    # DVC has loaded a dvc.yaml by which ssd1b reads the pictures of all: neither it nor a stage goes on.
    shutil.copy(ROOT / "dvc.yaml", pictures.root)
    monkeypatch.setenv("DVC_STAGE", "encode@ssd1b")
    for verb in (("resolve",), ("encode", "ssd1b")):
        with pytest.raises(UserError, match=r"dvc\.yaml: prepare-own: has no model, .* run `lcmlora resolve`, then"):
            run(pictures, *verb)


def test_config_and_preview_show_the_data_of_a_model(pictures: Project, tmp_path: Path):
    listed = json.loads(run(pictures, "config", "--json").stdout)
    found = {(each["model"], each["key"]): (each["value"], each["origin"]) for each in listed}
    assert found["ssd1b", "data.path"][0] == "large"
    assert found["ssd1b", "data.path"][1].endswith(" bases.ssd1b.data.path")
    assert found["ssd1b", "data.min_side"][1].endswith(" data.min_side")
    assert found["ssd1b", "data.seed"] == (0, "default")
    assert ("sd15", "data.path") not in found and (None, "data.path") in found
    sheet = tmp_path / "sheet.png"
    seen = run(pictures, "data", "preview", "--model", "ssd1b", "--out", str(sheet))
    assert seen.stdout == f"{sheet}\n" and "large" in run(pictures, "config", "data.path").stdout


def test_study_and_compatibility_bring_their_stages_and_take_them_away(tmp_path: Path):
    """A template of DVC must not name a setting that is not there."""
    with_study = load(tmp_path, {})
    without = with_study.model_copy(update={"study": None, "compatibility": None})
    project = Project(tmp_path)
    bare = dvc_yaml.whole(without)
    assert "study" not in bare and "compatibility" not in bare
    project.dvc_yaml.write_text(bare)
    with pytest.raises(UserError, match=r"lacks the stages of `study`, and params\.yaml has some; run `lcmlora res"):
        dvc_yaml.check(with_study, project)
    assert dvc_yaml.refresh(with_study, project) and not dvc_yaml.refresh(with_study, project)
    assert project.dvc_yaml.read_text() == dvc_yaml.whole(with_study)
    # `package` depends on the folders.
    assert (tmp_path / "study" / ".gitignore").is_file() and (tmp_path / "compatibility" / ".gitkeep").is_file()
    assert dvc_yaml.refresh(without, project) and project.dvc_yaml.read_text() == bare
