"""Every architecture through every stage, by the verbs that dvc.yaml calls, and by the flow itself (slow)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from lcmlora.bases import diffusers_pipeline, folders
from lcmlora.cli.main import app
from lcmlora.errors import UserError
from lcmlora.plugins import FEATURES
from tests.evaluation.conftest import Quarters
from tests.support import projects
from tests.support.miniature import ARCHITECTURES, SDXL_FAMILY
from tests.support.registries import fresh

ROOT = Path(__file__).parents[2]
STAGES = ("encode", "reference", "distill", "polish", "evaluate")
POLISH = {"steps": 2, "fake_updates": 1, "head_start": 1, "student_steps": [1, 2]}
VARIATIONS = (("style", "ink"), ("alone", "ink"), ("finetune", "clay"), ("alone", "clay"))


def _draws_as_the_student_did(root: Path, base: Path, model: str) -> None:
    """Loads release and base as any user of diffusers would and compares one forward."""
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    bare = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(root / "release" / model)
    settings = json.loads((root / "release" / model / "scheduler_config.json").read_text())
    expected = {"lcm": "LCMScheduler"}.get(projects.OBJECTIVES[model], "TCDScheduler")
    assert settings["_class_name"] == expected
    pipeline.scheduler = getattr(diffusers, expected).from_pretrained(root / "release" / model)
    probe = load_file(root / "adapters" / model / "probe.safetensors")
    student, alone = probe.pop("student"), probe.pop("base")
    with torch.no_grad():
        family = diffusers_pipeline.family_of(pipeline)
        output = family.forward(pipeline.unet, probe.pop("latents"), probe.pop("timesteps"), probe)
    scale = student.abs().max()
    assert (output - student).abs().max() < 1e-4 * scale < (student - alone).abs().max()
    drawn = load_file(root / "release" / model / "pytorch_lora_weights.safetensors")
    assert len(drawn) == 3 * sum(name.endswith("lora_A.lcm.weight") for name in _lora_names(pipeline, bare))
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("subject 1", num_inference_steps=4, guidance_scale=1.0, height=16, width=16).images[0]
    assert picture.size == (16, 16)


def _lora_names(pipeline: DiffusionPipeline, bare: dict[str, torch.Tensor]) -> list[str]:
    return [n.replace(".default_0.", ".lcm.") for n in pipeline.unet.state_dict() if "lora_A" in n and n not in bare]


@pytest.mark.parametrize(
    "model",
    ["sdxl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd15", "sd2", "ssd1b"))],
)
def test_a_miniature_goes_from_pictures_to_a_release_that_plain_diffusers_loads(
    miniatures: Callable[[str], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
):
    raw = projects.make(tmp_path, miniatures, fresh(tmp_path, tmp_path_factory).tracking_uri, model)
    FEATURES.register("quarters", Quarters)
    raw["evaluation"] |= {"pictures": 16, "features": "quarters"}  # the real ones need 321 pictures
    raw["study"]["models"] = [model]
    raw["distill"]["polish"] = POLISH
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    stages = [["prepare"], ["fetch", model], *([stage, model] for stage in STAGES)]
    stages += [[verb, model, name] for verb, name in VARIATIONS]
    for arguments in (*stages, ["study", model], ["package", model]):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    _draws_as_the_student_did(tmp_path, miniatures(model), model)
    metrics = json.loads(Path("release", model, "metrics.json").read_text())
    assert metrics["network_evaluations"]["student@4"] == 4
    assert all(value == value for value in metrics["distance_teacher"].values())
    assert {name: each["kind"] for name, each in metrics["variations"].items()} == {"ink": "style", "clay": "finetune"}
    assert len(metrics["guidance"]["excess"]) == 2 and len(metrics["weights"]["distance_real"][0]) == 2
    report = Path("release", model, "report.html").read_text()
    assert "ink" in report and "clay" in report
    folders.check_folder(Path("variations", model, "finetunes", "clay"))
    with pytest.raises(UserError, match=r"'other' is not studied with .*; params\.yaml `study` has ink, clay"):
        CliRunner().invoke(app, ["alone", model, "other"], catch_exceptions=False)
    with pytest.raises(UserError, match=r"unknown style 'other'; params\.yaml `styles` has ink"):
        CliRunner().invoke(app, ["style", model, "other"], catch_exceptions=False)
    cached = load_file(Path("data/latents", model, "text.safetensors"))
    assert ("text_embeds" in cached) == (model in SDXL_FAMILY)


@pytest.mark.slow
def test_all_architectures_go_through_the_flow(
    miniatures: Callable[[str], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    """`python -m pytest -m slow`: minutes, since every stage is a process of its own."""
    projects.make(tmp_path, miniatures, fresh(tmp_path, tmp_path_factory).tracking_uri, *ARCHITECTURES)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "study", tmp_path / "study")
    shutil.copytree(ROOT / "compatibility", tmp_path / "compatibility")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-m", "flows.retrain"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout
    for model in ARCHITECTURES:
        assert f"lcm-lora-{model}/1" in result.stdout
        _draws_as_the_student_did(tmp_path, miniatures(model), model)
