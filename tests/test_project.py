"""A project's paths are those of dvc.yaml, and it can be worked in from any folder."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from lcmlora import registry
from lcmlora.cli.context import Context
from lcmlora.cli.main import app
from lcmlora.cli.stages.verbs import VERBS
from lcmlora.dvc_files import resolved
from lcmlora.errors import UserError
from lcmlora.project import Project
from tests.data.conftest import add, picture
from tests.support import projects
from tests.support.registries import fresh

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"\$\{(.*?)\}")

# What each stage of dvc.yaml reads and writes, in its order there. `data` is data.path of params.yaml.
PATHS: dict[str, Callable[[Project, str, str, Path], list[Path]]] = {
    "resolve": lambda p, m, n, data: [p.resolved],
    "pretrain": lambda p, m, n, data: [p.npm_lock, p.base("emoji")],
    "prepare": lambda p, m, n, data: [data, p.pictures],
    "encode": lambda p, m, n, data: [p.pictures, p.base(m), p.latents(m)],
    "reference": lambda p, m, n, data: [p.pictures, p.base(m), p.reference(m)],
    "distill": lambda p, m, n, data: [p.latents(m), p.base(m), p.adapter(m)],
    "evaluate": lambda p, m, n, data: [
        *(p.adapter(m), p.base(m), p.pictures, p.reference(m)),
        *(p.evaluation(m), p.metrics(m), p.plot(m)),
    ],
    "style": lambda p, m, n, data: [data, p.base(m), p.style(m, n)],
    "finetune": lambda p, m, n, data: [data, p.base(m), p.finetune(m, n)],
    "style-alone": lambda p, m, n, data: [data, p.base(m), p.style(m, n), p.alone(m, n)],
    "finetune-alone": lambda p, m, n, data: [data, p.finetune(m, n), p.alone(m, n)],
    "study": lambda p, m, n, data: [p.adapter(m), p.base(m), p.reference(m), p.variations(m), p.study(m)],
    "compatibility": lambda p, m, n, data: [p.adapter(m), p.base(m), p.reference(m), p.compatibility(m)],
    "package": lambda p, m, n, data: [
        *(p.adapter(m), p.base(m), p.evaluation(m), p.metrics(m), p.studies, p.compatibilities),
        *(p.release(m) / name for name in ("pytorch_lora_weights.safetensors", f"lcm-lora-{m}.safetensors")),
        p.release(m) / "scheduler_config.json",
    ],
}


def declared(raw: dict[str, Any], params: dict[str, Any]) -> Iterator[tuple[str, str, list[Path]]]:
    """Yields model, name and all paths of each run of a stage of dvc.yaml; both are empty where it has none."""

    def looked_up(keys: str, item: dict[str, str]) -> Any:
        found: Any = {"item": item, **params}
        for key in keys.split("."):
            found = found[key]
        return found

    matrix = {key: looked_up(values[2:-1], {}) for key, values in raw.get("matrix", {}).items()}
    for chosen in itertools.product(*matrix.values()):
        item = dict(zip(matrix, chosen, strict=True))
        entries = [entry for key in ("deps", "outs", "metrics", "plots") for entry in raw.get(key, [])]
        texts = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
        paths = [NAME.sub(lambda found, item=item: str(looked_up(found[1], item)), text) for text in texts]
        yield item.get("model", ""), item.get("name", ""), list(map(Path, paths))


def test_every_dependency_and_output_in_dvc_yaml_is_the_projects_path_for_it():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["models"] = ["emoji", "sdxl"]
    params["study"] |= {"models": ["emoji"], "styles": ["ink"], "finetunes": ["clay"]}
    params["compatibility"] |= {"models": ["emoji"]}
    found = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert found.keys() == PATHS.keys()
    verbs = {name.removeprefix("style-").removeprefix("finetune-") for name in found} - {"resolve"}
    assert verbs == VERBS.keys() - {"polish"}  # tests/test_polish_stage.py
    for stage, raw in found.items():
        runs = list(declared(raw, params))
        assert runs, stage
        for model, name, paths in runs:
            assert paths == PATHS[stage](Project(), model, name, Path(params["data"]["path"])), stage


def test_a_folder_is_named_by_the_option_or_by_the_file_in_it():
    here = Context.of(None, None)
    assert here == Context(Project(Path()), named=False) and here.project.params_file == Path("params.yaml")
    assert Context.of(Path("params.yaml"), None).project == Project(Path())
    assert Context.of(Path("/owls/params.yaml"), None).project == Project(Path("/owls"))
    assert Context.of(None, Path("/owls")).project == Project(Path("/owls"))
    other = Context.of(Path("/owls/large.yaml"), None).project
    assert (other.root, other.params_file) == (Path("/owls"), Path("/owls/large.yaml"))
    assert Context.of(Path("large.yaml"), Path("/owls")).project == Project(Path("/owls"), Path("large.yaml"))


@pytest.fixture
def project(miniatures: Callable[[str], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose params.yaml has relative paths alone, with an empty registry."""
    root = tmp_path / "project"
    raw = projects.make(root, miniatures, "sqlite:///mlflow.db", "sd15")
    fresh(root, tmp_path_factory)
    (root / "here").symlink_to(miniatures("sd15"))
    raw["bases"]["sd15"]["source"] = "./here"
    raw["data"]["path"] = "pictures"
    raw["publish"] |= {"to": "shelf", "verify_key": "key.pem"}
    raw["evaluation"] |= {"scores_source": {"clip-score": "here", "hps": "some/hub-id"}}
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return root


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is no project."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_paths_in_settings_are_relative_to_the_project(project: Path, elsewhere: Path):
    opened = Project(project)
    settings = opened.settings()
    assert settings.registry.tracking_uri == f"sqlite:///{project}/mlflow.db"
    assert (settings.publish.to, settings.publish.verify_key) == (f"{project}/shelf", f"{project}/key.pem")
    assert settings.publish.signing_key is None
    assert opened.located_data(settings.data).path == f"{project}/pictures"
    sources = opened.located_evaluation(settings.evaluation_for("sd15")).scores_source
    assert sources == {"clip-score": f"{project}/here", "hps": "some/hub-id"}
    # What decides results is not touched, so that resolved.yaml and the adapter do not say where somebody stood.
    assert (settings.data.path, settings.bases["sd15"].source) == ("pictures", "./here")
    assert opened.located("s3://bucket/pictures") == "s3://bucket/pictures"


def test_in_the_current_folder_settings_are_as_written(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project)
    settings = Project().settings()
    assert (settings.registry.tracking_uri, settings.publish.to) == ("sqlite:///mlflow.db", "shelf")
    assert Project().located("./here") == "./here"


def test_a_project_elsewhere_is_prepared_encoded_and_looked_up_and_nothing_is_written_here(
    project: Path, elsewhere: Path
):
    for named in (("--project", project), ("--params", project / "params.yaml")):
        assert run(*named, "resolve").exit_code == 0
        assert run(*named, "fetch", "sd15").stdout == f"{project}/bases/sd15\n"
        assert (project / "bases/sd15").resolve() == (project / "here").resolve()
    assert resolved.is_current(Project(project).settings(), Project(project).resolved)
    assert str(project) not in Project(project).resolved.read_text()
    assert run("--project", project, "prepare").exit_code == 0
    assert run("--project", project, "encode", "sd15").exit_code == 0
    assert (project / "data/latents/sd15").is_dir()
    listed = json.loads(run("--project", project, "bases", "--json").stdout)
    assert [row["source"] for row in listed if row["name"] == "sd15" and "reason" not in row] == ["./here"]
    assert run("--project", project, "registry", "list").exit_code == 0
    assert run("--project", project, "releases", "list").stdout == f"no releases at {project}/shelf\n"
    assert list(elsewhere.iterdir()) == []


def test_what_a_person_names_is_relative_to_where_he_stands(project: Path, elsewhere: Path):
    add(elsewhere / "mine", "a.png", "an owl", picture(1, (80, 80)))
    add(elsewhere / "mine", "b.png", "a fox", picture(2, (80, 80)))
    assert run("--project", project, "data", "preview", "mine", "--out", "sheet.png").stdout == "sheet.png\n"
    assert sorted(path.name for path in elsewhere.iterdir()) == ["mine", "sheet.png"]


def test_a_missing_project_is_one_clear_line(elsewhere: Path):
    with pytest.raises(UserError, match=r"nowhere/params.yaml: no such file"):
        run("--project", "nowhere", "check")
    with pytest.raises(UserError, match=r"nowhere/params.yaml: no such file"):
        run("--project", "nowhere", "releases", "list", "--to", "shelf")


def test_a_pipeline_is_looked_up_in_a_project_elsewhere(
    project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LCMLORA_CACHE", str(project / "cache"))
    with pytest.raises(UserError, match=rf"tried: .* registered at sqlite:///{project}/mlflow.db.*; file://{project}/"):
        registry.load_pipeline("lcm-lora-sd15@champion", project=project)
    assert list(elsewhere.iterdir()) == []
