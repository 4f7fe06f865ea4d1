"""What another package adds by name works like what is here."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from lcmlora import config, plugins
from lcmlora.adapters.metadata import read_sampler
from lcmlora.cli.main import app
from lcmlora.config import Distill, Publish
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.prepare import PARTS, prepare_pictures
from lcmlora.data.sources.source import open_picture, read_records
from lcmlora.diffusion import objectives, sampling
from lcmlora.distillation.loss import Distillation, add_adapter
from lcmlora.dvc_files.resolved import resolve
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.gate import gate_failures
from lcmlora.evaluation.measures import features, scores
from lcmlora.evaluation.measures.bootstrap import Bootstrap
from lcmlora.evaluation.measures.distances import distance, named, title_of
from lcmlora.plugins import DISTANCES, FEATURES, OBJECTIVES, SAMPLERS, SCORES, SOURCES, STORES, Table
from lcmlora.projects import settings_reference
from lcmlora.releases.catalog import find_release, list_releases, presigned_links, pull_release, verify_release
from lcmlora.releases.publish import point_channel, publish_release
from lcmlora.stages import Run, decisive_settings, runs
from tests.data.conftest import data_in, picture
from tests.evaluation.test_gate import METRICS
from tests.support import additions
from tests.support.distillation import SETTINGS, draw_batch, load_parts, run_distill
from tests.support.releases import write_sealed

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TABLES = [table for table in vars(plugins).values() if isinstance(table, Table)]


@pytest.fixture(autouse=True)
def _registered_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in TABLES:
        monkeypatch.setattr(table, "_classes", dict(table._classes))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.key)
def test_each_name_of_each_table_has_its_class(table: Table) -> None:
    assert [table.get(name) for name in table.names]


@pytest.mark.parametrize("name", ["lcm", "tcd", "pcm", "tdd"])
def test_the_page_on_objectives_names_the_papers_and_the_scheduler_of_each(name: str) -> None:
    lines = (ROOT / "docs/objectives.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{name}` |"))
    objective = objectives.named(name)
    assert f"arXiv {', '.join(objective.papers)} |" in row
    assert objective.sampler_of(SETTINGS).scheduler in row
    assert all(f"`distill.{key}`" in row for key in objective.keys)


def test_a_source_is_added(tmp_path: Path) -> None:
    SOURCES.register("zip", additions.Zip)
    with ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for number in range(8):
            file = io.BytesIO()
            picture(number).save(file, "PNG")
            archive.writestr(f"subject {number}.png", file.getvalue())
        archive.writestr("broken.png", b"nothing of a picture")
    data = data_in(tmp_path / "pictures.zip", source="zip")
    report = prepare_pictures(data, 1, tmp_path / "out")
    assert (report["source"], report["read"], report["kept"]) == ("zip", 9, 8)
    records = [r for part in PARTS for r in read_records(tmp_path / "out" / f"{part}.jsonl")]
    assert {record.caption for record in records} == {f"subject {number}" for number in range(8)}
    for record in records:
        number = int(record.caption.removeprefix("subject "))
        assert open_picture(data, record).tobytes() == picture(number).tobytes()


def test_an_objective_is_added_with_its_sampler(base_folder: Path, cache: LatentCache, tmp_path: Path) -> None:
    OBJECTIVES.register("halfway", additions.Halfway)
    SAMPLERS.register("DDIMScheduler", additions.Ddim)
    settings = additions.HalfwaySettings.model_validate(SETTINGS.model_dump() | {"objective": "halfway"})
    base = load_parts(base_folder, "network")
    facts = run_distill(base, cache, tmp_path, settings)
    assert facts.sampler.plain() == {"scheduler": "DDIMScheduler", "gamma": None, "grid": 50}
    assert json.loads((tmp_path / "adapter/config.json").read_text())["distill"]["fraction"] == 0.5
    written = json.loads((tmp_path / "adapter/scheduler_config.json").read_text())
    assert written["_class_name"] == "DDIMScheduler"
    assert objectives.described("halfway") == "Halfway distillation (arXiv 2611.00001)"

    conditioning, noise = draw_batch(cache, settings).conditioning, torch.randn(4, *base.latent_shape)
    sampler = read_sampler(facts.sampler.plain(), "config.json")
    drawn = sampling.sample_student(base, conditioning, noise, steps=2, indices=range(4), sampler=sampler)
    x = noise
    for t, s in ((999, 499), (499, 0)):
        with torch.no_grad():
            output = base.predict(x, torch.full((4,), t), conditioning)
        x = base.schedule.state(*base.schedule.prediction(output, x, torch.tensor([t])), torch.tensor([s]))
    torch.testing.assert_close(drawn, x)

    coarse = settings.model_copy(update={"grid": 1})
    with pytest.raises(UserError, match=r"distill\.grid: 1 is too coarse for halfway, expected at least 2"):
        objectives.make(coarse, base.schedule)
    with pytest.raises(ValidationError, match=r"expected one of lcm, tcd, pcm, tdd, halfway"):
        Distill.model_validate(SETTINGS.model_dump() | {"objective": "third"})
    with pytest.raises(UserError, match="halfway needs settings of the class HalfwaySettings, got Distill"):
        objectives.make(SETTINGS.model_copy(update={"objective": "halfway"}), base.schedule)


def declare(folder: Path, entry_points: str) -> None:
    """Writes the metadata of a package `tapes` with these entry points, as pip installs it."""
    facts = folder / "tapes-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tapes\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(entry_points)


def load_halfway(folder: Path, distill: dict[str, Any], **own: Any) -> config.Config:
    """Returns the project's settings with the outside objective and these keys of `distill`, for all bases and one."""
    OBJECTIVES.register("halfway", additions.Halfway)
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["distill"] = distill
    if "objective" in distill:
        del raw["bases"]["emoji"]["distill"]["objective"]
    raw["bases"]["emoji"]["distill"] |= own
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return config.load(folder / "params.yaml")


def test_an_objective_brings_settings_that_stand_in_distill(tmp_path: Path, cache: LatentCache) -> None:
    loaded = load_halfway(tmp_path, {"objective": "halfway"}, fraction=0.25)
    settings = loaded.distill_for("emoji")
    assert isinstance(settings, additions.HalfwaySettings) and settings.fraction == 0.25
    by_default = load_halfway(tmp_path, {"objective": "halfway"})
    stale = [run for run in runs(loaded) if decisive_settings(loaded, run) != decisive_settings(by_default, run)]
    assert stale == [Run("distill", "emoji")]
    assert resolve(loaded)["models"]["emoji"]["distill"]["distill"]["fraction"] == 0.25
    assert resolve(by_default)["models"]["emoji"]["distill"]["distill"]["fraction"] == 0.5


def test_a_setting_of_an_added_objective_changes_the_loss(base_folder: Path, cache: LatentCache) -> None:
    OBJECTIVES.register("halfway", additions.Halfway)
    SAMPLERS.register("DDIMScheduler", additions.Ddim)

    def loss(**own: float) -> float:
        values = SETTINGS.model_dump() | {"objective": "halfway"} | own
        settings = additions.HalfwaySettings.model_validate(values)
        base = load_parts(base_folder, "network")
        add_adapter(base, settings)
        distillation = Distillation(base, cache.unconditional(), settings)
        with torch.no_grad():
            return distillation.losses(draw_batch(cache, settings)).mean().item()

    assert loss() == loss(fraction=0.5) != loss(fraction=0.25)


@pytest.mark.parametrize(
    ("distill", "own", "message"),
    [
        (
            {"objective": "halfway", "fraction": "half"},
            {},
            "distill.fraction: got 'half': Input should be a valid number, unable to parse string as a number",
        ),
        (
            {"objective": "halfway"},
            {"fraction": 2},
            "bases.emoji.distill.fraction: got 2: Input should be less than or equal to 1",
        ),
        (
            {"objective": "halfway", "fractoin": 0.25},
            {},
            "distill.fractoin: there is no such key; of its own, objective halfway has fraction",
        ),
        (
            {"fraction": 0.25},
            {"objective": "lcm"},
            "distill.fraction: there is no such key; of its own, objective lcm has no settings",
        ),
        (
            {"objective": "halfway", "fraction": 0.25},
            {"objective": "lcm"},
            "distill.fraction: there is no such key; of its own, objective lcm has no settings",
        ),
    ],
)
def test_a_setting_that_does_not_fit_an_added_objective_is_one_line(
    tmp_path: Path, distill: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        load_halfway(tmp_path, distill, **own)
    assert str(error.value) == f"{tmp_path / 'params.yaml'}: {message}"


def test_the_settings_of_an_added_objective_are_in_the_schema_the_page_and_what_config_prints(tmp_path: Path) -> None:
    load_halfway(tmp_path, {"objective": "halfway"}, fraction=0.25)
    described = "halfway: Where the jump ends, as a share of the timestep that the teacher steps to."
    schema = settings_reference.json_schema(config.Config)
    for distill in (schema["properties"]["distill"], schema["$defs"]["Base"]["properties"]["distill"]):
        assert distill["properties"]["fraction"]["description"] == described
        assert distill["properties"]["fraction"]["maximum"] == 1 and distill["additionalProperties"] is False
    page = settings_reference.configuration_page(config.Config)
    assert f"| `fraction` | number, at least 0, at most 1 | 0.5 | {described} |" in page
    called = ["--params", str(tmp_path / "params.yaml"), "config", "distill.fraction"]
    told = CliRunner().invoke(app, called, catch_exceptions=False).stdout.splitlines()
    assert told[1].split()[:2] == ["distill.fraction", "0.25"] and told[1].endswith("bases.emoji.distill.fraction")
    assert told[2] == described


def test_an_objective_whose_settings_are_no_settings_of_distill_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    OBJECTIVES.register("halfway", additions.Halfway)
    monkeypatch.setattr(additions.Halfway, "settings_class", Publish)
    with pytest.raises(UserError, match=r"halfway: its settings_class is .*Publish.*, expected a subclass of"):
        config.distill_settings("halfway")


def test_an_entry_point_brings_an_objective_and_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(tmp_path, "[lcmlora.objectives]\nmidway = tests.support.additions:Halfway\n")
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["bases"]["emoji"]["distill"] |= {"objective": "midway", "fraction": 0.25}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"distill\.objective: got 'midway': expected one of lcm, tcd, pcm, tdd"):
        config.load(tmp_path / "params.yaml")
    monkeypatch.syspath_prepend(tmp_path)
    settings = config.load(tmp_path / "params.yaml").distill_for("emoji")
    assert isinstance(settings, additions.HalfwaySettings) and settings.fraction == 0.25


def test_settings_with_an_objective_of_this_package_are_read_without_importing_it() -> None:
    assert all(objectives.named(name).settings_class is Distill for name in ("lcm", "tcd", "pcm", "tdd"))
    code = "import sys; from lcmlora import config; config.load(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_features_a_distance_and_a_score_are_added() -> None:
    DISTANCES.register("mean-shift", additions.MeanShift)
    FEATURES.register("mean-colour", additions.MeanColour)
    SCORES.register("brightness", additions.Brightness)
    colours = features.load("mean-colour", CPU)
    dark, light = torch.full((6, 3, 8, 8), 0.25), torch.full((6, 3, 8, 8), 0.75)
    sets = colours(dark), colours(light)
    assert distance(*sets, colours.distance) == pytest.approx(3 * 0.5**2)
    assert named(colours.distance).pictures_needed(colours.dimensions) == 2
    samples = Bootstrap(["a", "b"] * 3, resamples=5).excess(sets[0], sets[0], {"light": sets[1]}, colours.distance)
    assert samples["light"].tolist() == pytest.approx([3 * 0.5**2] * 5)
    assert (title_of("mean-shift"), title_of("of a package that is not here")) == (
        "mean shift",
        "of a package that is not here",
    )
    assert scores.load("brightness", CPU)(light, ["a"] * 6).tolist() == pytest.approx([0.75] * 6)


def test_a_plain_function_from_another_package_is_a_score_and_judges_at_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "judges-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: judges\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[lcmlora.scores]\ncontrast = tests.support.additions:contrast\n")
    monkeypatch.syspath_prepend(tmp_path)
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["gate"] = {"limits": {"contrast": {"min": 0.4, "max": 0.9}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=r"emoji: gate\.limits: contrast is not among evaluation\.scores"):
        config.load(tmp_path / "params.yaml", ROOT)
    raw["evaluation"] = {"scores": ["contrast"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    settings = config.load(tmp_path / "params.yaml", ROOT)

    scorer = scores.load(settings.evaluation_for("emoji").scores[0], CPU)
    drawn = torch.tensor([[0.0, 0.5], [0.25, 0.5]]).repeat_interleave(3, 0).reshape(2, 3, 1, 2)
    assert (scorer.name, scorer(drawn, ["a", "b"]).tolist()) == ("contrast", [0.5, 0.25])
    with pytest.raises(ValueError, match="2 pictures with 1"):
        scorer(drawn, ["a"])
    with pytest.raises(UserError, match=r"scores_source: contrast is a function, which takes no weights"):
        scores.load("contrast", CPU, "weights.pth")

    def failures(value: float) -> list[str]:
        judged = METRICS | {"scores": {scorer.name: {"student@4": value}}}
        return gate_failures(Metrics.parse(judged, "metrics"), settings.gate)

    assert failures(0.5) == []
    assert failures(0.25) == ["student@4: contrast 0.25 is below 0.4 (gate.limits): 0.15 too low"]
    assert failures(1.0) == ["student@4: contrast 1 is above 0.9 (gate.limits): 0.1 too high"]
    assert len(failures(float("nan"))) == 2
    (line,) = gate_failures(Metrics.parse(METRICS, "metrics"), settings.gate)
    assert line == "student@4: contrast was not measured (gate.limits); add it to evaluation.scores"


def test_a_store_is_added(tmp_path: Path) -> None:
    STORES.register("memory", additions.Memory)
    settings, bundle = Publish(to="memory://shelf/models"), write_sealed(tmp_path / "bundle")
    uri = publish_release(bundle, "mini", settings)
    assert publish_release(bundle, "mini", settings) == uri and uri.startswith("memory://shelf/models/mini/sha256-")
    _, sha256 = find_release(uri, settings)
    assert point_channel("mini", sha256, settings) == "memory://shelf/models/mini/channels/champion.json"
    assert [(found.uri, found.channels) for found in list_releases(settings)] == [(uri, ("champion",))]
    assert verify_release("mini@champion", settings).sha256 == sha256
    pull_release("mini@champion", settings, tmp_path / "pulled", everything=True)
    for path in bundle.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match=r"memory://prefix gives no links; they need a release at s3://bucket/prefix"):
        presigned_links(uri, settings, 60)
    with pytest.raises(
        UserError,
        match=r"expected a directory or s3://bucket/prefix or hf://owner/name or memory://prefix, got 'ftp://x'",
    ):
        list_releases(Publish(to="ftp://x"))


def test_an_unknown_name_is_an_error_when_the_settings_are_read_and_says_which_there_are(tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["data"]["source"] = "tape"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    known = "expected one of emoji, folder, parquet, webdataset, prompts"
    with pytest.raises(UserError, match=rf"data\.source: got 'tape': {known}"):
        config.load(tmp_path / "params.yaml")


def test_the_entry_point_of_an_installed_package_is_a_name_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = "tape = tests.support.additions:Zip\nreel = tests.support.additions:Reel\n"
    declare(tmp_path, f"[lcmlora.sources]\n{places}")
    assert "tape" not in SOURCES.names
    monkeypatch.syspath_prepend(tmp_path)
    assert data_in(tmp_path, source="tape").source == "tape"
    assert SOURCES.get("tape") is additions.Zip
    with pytest.raises(UserError, match=r"data\.source: reel: tapes declares tests\.support\.additions:Reel, and"):
        SOURCES.get("reel")


def test_a_name_that_is_taken_is_not_given_to_another_class() -> None:
    with pytest.raises(ValueError, match=r"data\.source: there is a folder already"):
        SOURCES.register("folder", additions.Zip)
