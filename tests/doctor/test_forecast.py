"""What `lcmlora doctor` says of a base before anything is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from lcmlora import config
from lcmlora.cli.main import app
from lcmlora.config import Base, Config
from lcmlora.doctor import gpus, tables
from lcmlora.doctor.forecast import FITS, MAY_FIT, TOO_LARGE, Forecast, forecast, needed, outside_projects
from lcmlora.doctor.gpus import Gpu
from lcmlora.doctor.workload import MetaBase
from lcmlora.errors import UserError
from lcmlora.project import Project


@pytest.fixture
def settings(base_folder: Path) -> Config:
    own = {"encode": {"batch": 2}, "distill": {"batch": 4, "rank": 4}, "evaluation": {"batch": 2, "pictures": 64}}
    base = {"source": str(base_folder), "resolution": 16, "license": "apache-2.0"} | own
    values = {"models": ["mini"], "bases": {"mini": base}, "data": {"source": "folder", "path": "pictures"}}
    return config.parse(values, Path("params.yaml"))


@pytest.fixture(scope="module")
def counted(base_folder: Path) -> MetaBase:
    """The base, of which each piece of work is counted once for all tests."""
    return MetaBase("mini", Base(source=str(base_folder), resolution=16, license="apache-2.0"), base_folder)


def test_the_persons_own_settings_stay_where_they_fit(settings: Config, counted: MetaBase, tmp_path: Path):
    found = forecast(settings, "mini", Project(tmp_path), memory=24, counted=counted)
    assert {stage.stage: stage.verdict for stage in found.stages} == dict.fromkeys(
        ("encode", "distill", "reference", "evaluate"), FITS
    )
    assert found.changes() == {} and list(tables.advice(found)) == []
    assert found.stage("distill").settings == {"distill.accumulate": 1, "distill.checkpointing": "selective"}
    assert (found.pictures, found.pictures_assumed) == (10_000, True)
    assert found.disk["latent cache"] == found.disk["DVC's copy of it, unless its cache links files"]


def test_a_polish_is_counted_where_it_is_asked_for_with_its_second_adapter_and_its_drawings(
    settings: Config, counted: MetaBase, tmp_path: Path
):
    def with_polish(**changes: object) -> Forecast:
        polish = {"steps": 100, "fake_updates": 2, "head_start": 0, "student_steps": [1], "w": 0.0} | changes
        values = settings.model_dump(mode="json", exclude_unset=True)
        values["bases"]["mini"]["distill"] |= {"polish": polish, "validate_every": 100}
        return forecast(
            config.parse(values, Path("params.yaml")), "mini", Project(tmp_path), memory=24, counted=counted
        )

    plain = forecast(settings, "mini", Project(tmp_path), memory=24, counted=counted)
    found = with_polish(consistency=0.0)
    assert [stage.stage for stage in found.stages] == ["encode", "distill", "polish", "reference", "evaluate"]
    distill, polish = found.stage("distill"), found.stage("polish")
    assert distill == plain.stage("distill")
    # The base once: what comes on top are weights, their average, two moments, and the text encoders.
    second = 4 * 4 * plain.lora_parameters + 2 * counted.text_parameters
    assert polish.tensors == distill.tensors + second

    step = counted.step(settings.distill_for("mini"), 4, torch.bfloat16, checkpointing="selective")
    forward, student = step.target.operations, step.student.operations
    one = 2 * (forward + student) + forward + forward + student  # two updates, teacher, fake score, student
    more = with_polish(consistency=0.0, steps=300).stage("polish").operations - polish.operations
    validations = 2 * 64 * (counted.evaluation() + counted.decoding_operations(torch.bfloat16))
    choosing = settings.evaluation_for("mini").choosing_pictures
    assert more == pytest.approx(200 * one + validations * choosing / 64, rel=1e-6)
    guided = with_polish(consistency=0.0, w=1.0).stage("polish").operations - polish.operations
    assert guided == pytest.approx(100 * (step.teacher.operations - forward), rel=1e-6)
    consistent = with_polish(consistency=1.0).stage("polish").operations - polish.operations
    assert consistent == pytest.approx(100 * step.operations, rel=1e-6)
    anchor = {"anchor": 0.05, "anchor_steps": 3}
    anchored = with_polish(consistency=0.0, **anchor).stage("polish").operations - polish.operations
    assert anchored == pytest.approx(100 * (3 * step.teacher.operations + student), rel=1e-6)


@pytest.mark.slow
def test_a_batch_is_divided_before_activations_are_recomputed_and_what_cannot_fit_is_said(
    settings: Config, counted: MetaBase, tmp_path: Path
):

    def within(gigabytes: float | None) -> Forecast:
        return forecast(settings, "mini", Project(tmp_path), memory=gigabytes, counted=counted)

    plain = within(None)
    assert plain.stage("distill").verdict is None
    whole = plain.stage("distill").tensors
    short = within((needed(whole)[1] - 1e5) / 1e9)
    distill = short.stage("distill")
    assert distill.verdict == FITS and distill.tensors < whole
    assert distill.changed == {"distill.accumulate": distill.settings["distill.accumulate"]}
    assert short.changes()["distill"]["accumulate"] in (2, 4)
    assert f"    distill: {{accumulate: {distill.changed['distill.accumulate']}}}" in list(tables.advice(short))
    assert distill.operations == pytest.approx(plain.stage("distill").operations, rel=1e-2)
    assert {stage.verdict for stage in within(0.8).stages} == {MAY_FIT}
    none = within(0.4)
    assert {stage.verdict for stage in none.stages} == {TOO_LARGE} and none.changes() == {}
    assert any("a smaller distill.rank" in line for line in tables.advice(none))


def test_what_the_project_has_already_is_taken_from_it(
    settings: Config, counted: MetaBase, base_folder: Path, tmp_path: Path
):
    project = Project(tmp_path)
    shutil.copytree(base_folder, project.base("mini"))
    project.pictures.mkdir(parents=True)
    (project.pictures / "train.jsonl").write_text("{}\n" * 7)
    found = forecast(settings, "mini", project, counted=counted)
    assert (found.pictures, found.pictures_assumed) == (7, False)
    on_disk = sum(path.stat().st_size for path in base_folder.rglob("*") if path.is_file())
    assert found.download["base"] == on_disk
    assert forecast(settings, "mini", project, pictures=14, counted=counted).stage(
        "encode"
    ).operations == pytest.approx(2 * found.stage("encode").operations)


@pytest.mark.slow
def test_doctor_counts_a_published_base_in_an_empty_folder_and_fetches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, ["doctor", "sd15", "--gpu", "nvidia RTX4090", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["counted"] and found["parameters"] == 859_520_964 and found["resolution"] == 512
    assert found["memory"] == 24 and found["precision"] == "bfloat16"
    assert found["download"]["base"] == 2 * (859_520_964 + 83_653_863 + 123_060_480)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    # 1000 steps of 16 pictures, 4.57e12 operations each: 35 % and 10 % of 165.2e12 a second are 0.35 and 1.2 hours.
    assert stages["distill"]["operations"] == pytest.approx(7.3e16, rel=0.02)
    assert found["hours"]["RTX 4090"]["distill"] == pytest.approx([0.352, 1.23], rel=0.02)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_in_a_project_it_counts_with_its_settings_and_measures_once_the_base_is_there(
    settings: Config, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    own = {"source": str(base_folder), "encode": {"batch": 2}, "evaluation": {"batch": 2, "pictures": 64}}
    own |= {"distill": {"batch": 4, "rank": 4, "steps": 50, "device": "cpu"}, "resolution": 16, "license": "mit"}
    values = {"models": ["mini"], "bases": {"mini": own}, "data": {"source": "folder", "path": "pictures"}}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    counted = CliRunner().invoke(app, ["doctor", "mini", "--gpu-gb", "16"], catch_exceptions=False).stdout
    assert "50 steps of 4 pictures" in counted and "rank 4" in counted and "RTX 4080" in counted
    assert "10,000 (assumed; --pictures)" in counted
    Path("bases").mkdir()
    Path("bases/mini").symlink_to(base_folder)
    measured = json.loads(CliRunner().invoke(app, ["doctor", "mini", "--json"], catch_exceptions=False).stdout)
    assert measured["random_latents"] and measured["trials"][0]["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bases", "params.yaml", "scratch"]


def test_a_name_of_nothing_is_refused_with_what_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"sd99: no such base; expected sd15, sd21, sdxl, ssd1b, a folder"):
        outside_projects("sd99")
    with pytest.raises(UserError, match=r"--gpu: GTX 970: expected one of T4, V100"):
        gpus.named("GTX 970")
    assert gpus.named("geforce rtx 4090") == Gpu("RTX 4090", 24, 165.2)
    assert [gpu.name for gpu in gpus.of_memory(16)] == ["T4", "V100", "RTX 4080"]
    assert Gpu("mine", 24, None).hours(1e15) is None
    assert outside_projects("segmind/SSD-1B")[0] == "ssd1b"
