import base64
import hashlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from lcmlora.adapters import formats, lora
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import architecture
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Config
from lcmlora.diffusion import samplers
from lcmlora.dvc_files import stage_records
from lcmlora.errors import UserError
from lcmlora.project import Project
from lcmlora.releases import package as release
from lcmlora.releases.bundle import WEIGHTS, Provenance, digest, verify
from lcmlora.stages import Run
from tests.support import adapters
from tests.support.releases import ADDITIONS, METRICS, load_settings, settings, write_stages


def package(root: Path, base_folder: Path, **changes: Any) -> dict[str, Any]:
    made = release.package_release("mini", load_settings(base_folder, **changes), Project(root), base_folder)
    return made.plain()


@pytest.fixture
def stages(base: LoadedBase, tmp_path: Path) -> Path:
    write_stages(base, tmp_path)
    return tmp_path


def test_the_bundle_has_every_file_and_passes_coreutils_sha256sum(stages: Path, base_folder: Path):
    package(stages, base_folder)
    names = {path.name for path in (stages / "release/mini").iterdir()}
    assert names == {
        "pytorch_lora_weights.safetensors",
        "lcm-lora-mini.safetensors",
        "report.html",
        "scheduler_config.json",
        "README.md",
        "provenance.json",
        "metrics.json",
        "grid.png",
        "comfyui.json",
        "sample.png",
        "SHA256SUMS",
    }
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=stages / "release/mini", capture_output=True, text=True
    )
    assert checked.returncode == 0
    assert checked.stdout.count(": OK") == 10
    verify(stages / "release/mini")


def test_figures_with_additions_are_released_if_they_are_of_this_adapter(stages: Path, base_folder: Path):
    path, release_folder = stages / "compatibility/mini.json", stages / "release/mini"
    path.parent.mkdir()
    trained = hashlib.sha256((stages / "adapters/mini/pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    ADDITIONS.model_copy(update={"adapter": trained}).write(path)
    provenance = package(stages, base_folder, gate={"compatible": ["lora ink 1", "nothing"]})
    assert provenance["gate"]["failures"][-1] == (
        "student@4: lora ink 1: excess 300 is more than 2 times the 88 (gate.compatible)"
    )
    assert (release_folder / "compatibility.json").read_bytes() == path.read_bytes()
    assert "## Together with what people add to the base" in (release_folder / "README.md").read_text()
    page = (release_folder / "report.html").read_text()
    assert "style LoRA ink, weight 1" in page and "the teacher draws nothing finite" in page

    ADDITIONS.write(path)  # of another adapter
    package(stages, base_folder)
    assert not (release_folder / "compatibility.json").exists()
    assert "style LoRA ink" not in (release_folder / "report.html").read_text()


def test_the_sample_opens_in_comfyui_as_the_workflow_beside_it(stages: Path, base_folder: Path):
    row = stages / "evaluation/mini/pictures/student@4.png"  # 4 steps are the recommended ones of METRICS
    Image.effect_noise((16, 32), 50).convert("RGB").save(row)
    package(stages, base_folder)
    editor = json.loads((stages / "release/mini/comfyui.json").read_text())
    graph = editor["extra"].pop("prompt")
    with Image.open(stages / "release/mini/sample.png") as sample, Image.open(row) as drawn:
        assert sample.convert("RGB").tobytes() == drawn.crop((0, 0, 16, 16)).tobytes()
        assert json.loads(sample.info["prompt"]) == graph
        assert json.loads(sample.info["workflow"]) == editor
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert inputs["LoraLoaderModelOnly"]["lora_name"] == "lcm-lora-mini.safetensors"
    assert inputs["CheckpointLoaderSimple"]["ckpt_name"] == f"{base_folder.name}.safetensors"
    assert (inputs["KSampler"]["steps"], inputs["KSampler"]["sampler_name"]) == (4, "lcm")
    assert inputs["EmptyLatentImage"]["width"] == 16
    assert "owl" in [node["inputs"].get("text") for node in graph.values()]


def test_provenance_says_what_went_in_and_how_well_it_came_back(stages: Path, base_folder: Path, monkeypatch):
    monkeypatch.chdir(stages)
    Path("dvc.lock").write_text("schema: '2.0'\n")
    returned = package(stages, base_folder)
    written = json.loads((stages / "release/mini/provenance.json").read_text())
    assert written == returned
    weights = (stages / "adapters/mini/pytorch_lora_weights.safetensors").read_bytes()
    assert written["adapter"] == hashlib.sha256(weights).hexdigest()
    assert written["sha256"] == digest(stages / "release/mini") != written["adapter"]
    assert written["dvc_lock"] == hashlib.sha256(b"schema: '2.0'\n").hexdigest()
    assert written["git"] == {"commit": None, "dirty": None}
    assert written["params"]["distill"]["rank"] == 64
    assert written["base"]["digest"] == "b" * 64
    gate = written["gate"]
    assert (gate["passed"], gate["failures"], gate["by_steps"]["4"]) == (True, [], [])
    assert written["recommended_steps"] == min(int(steps) for steps, why in gate["by_steps"].items() if not why)
    assert written["reloaded"]["error"] < 1e-5 < written["reloaded"]["effect"]
    assert written["reloaded"]["tensors"] == len(load_file(stages / "adapters/mini" / WEIGHTS))
    assert written["sampler"] == {"scheduler": "LCMScheduler", "gamma": None, "grid": 50}
    assert written["resolution"] == 16


def test_plain_diffusers_draws_as_the_adapters_own_sampler_at_every_number_of_steps(stages: Path, base_folder: Path):
    check = package(stages, base_folder)["sampler_check"]
    assert check["timesteps"] == {"2": [999, 499], "4": [999, 759, 499, 259]}
    assert (check["gamma"], check["guidance_scale"], check["side"]) == (None, 1, None)
    assert check["scheduler_config"] == json.loads((stages / "release/mini/scheduler_config.json").read_text())
    assert check["error"].keys() == {"2", "4"} and max(check["error"].values()) < 1e-5
    card = (stages / "release/mini/README.md").read_text()
    assert "| 2 | 999, 499 |\n| 4 | 999, 759, 499, 259 |\n" in card
    header = adapters.header(stages / "release/mini" / WEIGHTS)
    assert json.loads(header["lcmlora.sampler"]) == {
        "scheduler": "LCMScheduler",
        "gamma": None,
        "guidance_scale": 1,
        "timesteps": check["timesteps"],
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"timestep_scaling": 0.01}, r"4 steps plain diffusers, used as the card says, draws \S+ of the largest value"),
        ({"original_inference_steps": 25}, r"2 steps plain diffusers evaluates the network at \[999, 519\], .* 499\]"),
    ],
)
def test_a_scheduler_that_does_not_draw_as_the_adapter_was_trained_to_is_not_released(
    stages: Path, base_folder: Path, changed: dict[str, Any], message: str
):
    path = stages / "adapters/mini/scheduler_config.json"
    # Values that are named there are not read.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_use_default_values": []} | changed))
    with pytest.raises(UserError, match=message):
        package(stages, base_folder)
    assert not (stages / "release/mini").exists()


def test_strategic_stochastic_sampling_is_drawn_with_its_gamma(base: LoadedBase, stages: Path, base_folder: Path):
    sampler = {"scheduler": "TCDScheduler", "gamma": 0.3, "grid": 50}
    adapter = stages / "adapters/mini"
    (adapter / "config.json").write_text(
        json.dumps(json.loads((adapter / "config.json").read_text()) | {"sampler": sampler})
    )
    config = samplers.scheduler_config(base.scheduler_config, Sampler(**sampler))
    (adapter / "scheduler_config.json").write_text(json.dumps(config))
    check = package(stages, base_folder)["sampler_check"]
    assert check["gamma"] == 0.3 and max(check["error"].values()) < 1e-5
    header = adapters.header(stages / "release/mini" / WEIGHTS)
    assert header["modelspec.usage_hint"] == "TCD, gamma 0.3, 4 steps, CFG 1"


def test_the_header_says_what_the_adapter_is_and_how_to_draw_with_it(stages: Path, base_folder: Path):
    package(stages, base_folder)
    header = adapters.header(stages / "release/mini" / WEIGHTS)
    thumbnail = header["modelspec.thumbnail"].removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(thumbnail))) as picture:
        assert picture.size == (16, 16)
    assert header["modelspec.usage_hint"] == "LCM, 4 steps, CFG 1"
    assert header["modelspec.license"] == "apache-2.0" and "modelspec.author" not in header
    assert "pictures in 2, 4 steps" in header["modelspec.description"]


def test_the_header_names_the_author_where_the_settings_do(stages: Path, base_folder: Path):
    raw = settings(base_folder)
    raw["bases"]["mini"] |= {"author": "The team"}
    release.package_release("mini", Config.model_validate(raw), Project(stages), base_folder)
    assert adapters.header(stages / "release/mini" / WEIGHTS)["modelspec.author"] == "The team"


def test_provenance_says_which_model_and_when_and_the_adapter_does_not(stages: Path, base_folder: Path, monkeypatch):
    """So that the same inputs give the same adapter, and with SOURCE_DATE_EPOCH the same provenance."""
    folder = stages / "release/mini"
    adapters_then = ("pytorch_lora_weights.safetensors", "lcm-lora-mini.safetensors", "scheduler_config.json")
    made = []
    for epoch in ("1764288000", "1764288001"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        facts = package(stages, base_folder)
        made.append(({name: (folder / name).read_bytes() for name in adapters_then}, facts))
    assert made[0][0] == made[1][0]
    assert [facts.pop("packaged") for _, facts in made] == ["2025-11-28T00:00:00Z", "2025-11-28T00:00:01Z"]
    assert made[0][1] == made[1][1] and made[0][1]["model"] == "mini"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UserError, match=r"SOURCE_DATE_EPOCH: expected seconds since 1970, got 'yesterday'"):
        package(stages, base_folder)


def test_the_bundle_has_this_machines_timings_and_none_of_another_adapter(stages: Path, base_folder: Path, capsys):
    assert "seconds_per_picture" not in json.loads((stages / "metrics/mini.json").read_text())
    package(stages, base_folder)
    folder = stages / "release/mini"
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["seconds_per_picture"] == METRICS["seconds_per_picture"]
    assert "seconds per picture" in (folder / "README.md").read_text()
    assert ">seconds</th>" in (folder / "report.html").read_text()
    assert capsys.readouterr().err == ""

    timings = stages / "timings/mini/evaluation.json"
    timings.write_text(json.dumps(json.loads(timings.read_text()) | {"adapter": "0" * 64}))
    package(stages, base_folder)
    assert "seconds_per_picture" not in json.loads((folder / "metrics.json").read_text())
    assert "seconds per picture" not in (folder / "README.md").read_text()
    assert ">seconds</th>" not in (folder / "report.html").read_text()
    assert "has no latencies of this adapter" in capsys.readouterr().err


def test_both_files_of_the_weights_have_the_same_bytes_and_the_trained_effect(stages: Path, base_folder: Path):
    kohya = package(stages, base_folder)["kohya"]
    path = stages / "release/mini" / kohya["file"]
    assert (kohya["file"], kohya["sha256"]) == (
        "lcm-lora-mini.safetensors",
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    assert kohya["reloaded"]["error"] < 1e-5 < kohya["reloaded"]["effect"]
    tensors = load_file(path)
    assert len(tensors) == 3 * kohya["reloaded"]["tensors"] / 2
    base = architecture.of_folder(base_folder)
    assert path.read_bytes() == path.with_name(WEIGHTS).read_bytes()
    released, trained = formats.read(path, base), formats.read(stages / "adapters/mini" / WEIGHTS, base)
    assert formats.compare(trained, released) == 0
    assert adapters.header(path)["modelspec.title"] == "lcm-lora-mini"


def test_a_layer_that_goes_missing_from_the_file_for_comfyui_fails_the_package(
    stages: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    save_all = lora.save_file

    def save_but_one(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_all({n: t for n, t in tensors.items() if "attn1_to_q" not in n}, path, **options)

    monkeypatch.setattr(lora, "save_file", save_but_one)
    with pytest.raises(UserError, match=r"tensors were lost, the first is lora_unet_down_blocks_1_.*attn1_to_q\.alpha"):
        package(stages, base_folder)
    assert not (stages / "release/mini").exists()


def test_the_git_commit_is_recorded_and_changed_code_is_called_dirty_but_fresh_results_are_not(
    stages: Path, base_folder: Path, monkeypatch
):
    monkeypatch.chdir(stages)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    Path("code.py").write_text("a = 1\n")
    git("add", "code.py", "metrics")
    git("commit", "-q", "-m", "x")
    metrics = Path("metrics/mini.json")
    metrics.write_text(metrics.read_text() + "\n")
    assert package(stages, base_folder)["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    Path("code.py").write_text("a = 2\n")
    assert package(stages, base_folder)["git"]["dirty"] is True


def test_provenance_is_of_the_training_and_not_of_the_moment_of_packaging(
    stages: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(stages)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "trained")
    trained = git("rev-parse", "HEAD")
    settings = load_settings(base_folder)
    for stage in ("distill", "evaluate"):
        with stage_records.recorded(Project(stages), Run(stage, "mini"), lambda: settings):
            pass
    git("commit", "-q", "--allow-empty", "-m", "packaged")
    provenance = package(stages, base_folder, evaluation={"resamples": 300}, data={"seed": 99})
    assert provenance["git"] == {"commit": trained, "dirty": False}
    assert provenance["packaged_with"]["git"]["commit"] == git("rev-parse", "HEAD") != trained
    assert provenance["params"]["evaluation"] == settings.evaluation_for("mini").model_dump(mode="json")
    assert provenance["params"]["data"]["seed"] == 99  # nothing is known of `encode`, whose output is not here
    assert set(provenance["stages"]) == {"distill", "evaluate"}
    assert provenance["stages"]["distill"]["git"]["commit"] == trained
    assert Provenance.read(stages / "release/mini/provenance.json").plain() == provenance


def test_the_card_has_the_front_matter_of_the_hub_and_the_figures(stages: Path, base_folder: Path):
    package(stages, base_folder)
    _, front, body = (stages / "release/mini/README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["library_name"] == "diffusers"
    assert facts["pipeline_tag"] == "text-to-image"
    assert facts["license"] == "apache-2.0"
    assert "base_model" not in facts  # a folder is no model on the hub
    assert {"lora", "lcm", "latent-consistency"} <= set(facts["tags"])
    figures = body.partition("## Figures")[2].partition("### What each number of steps is good for")[0]
    rows = [line for line in figures.splitlines() if line.startswith("| ") and line[2] != "|"]
    assert rows == [
        "| ddim@1 | 2 | 285.00 | 0.100 | 0.0100 |",
        "| student@2 | 2 | 10.00 | 0.700 | 0.0100 |",
        "| dpm++@2 | 4 | 93.00 | 0.500 | 0.0200 |",
        "| student@4 | 4 | 4.50 | 0.850 | 0.0200 |",
        "| teacher@50 | 100 |  | 0.900 | 0.2000 |",
    ]
    assert "100 captioned pictures" in body
    assert "The gate was passed" in body
    assert "\n\n\n" not in body


def test_a_failed_gate_is_told_in_card_and_provenance(stages: Path, base_folder: Path):
    provenance = package(stages, base_folder, gate={"min_retrieval": 1.0})
    assert provenance["gate"]["passed"] is False
    assert "retrieval 0.850" in provenance["gate"]["failures"][0]
    assert f"* {provenance['gate']['failures'][0]}" in (stages / "release/mini/README.md").read_text()


def test_the_five_lines_of_the_card_draw_a_picture(stages: Path, base_folder: Path):
    package(stages, base_folder)
    folder = stages / "release/mini"
    card = (folder / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(folder))
    assert len(lines.splitlines()) == 5
    exec(lines.replace('"picture.png"', repr(str(stages / "picture.png"))), {})
    assert (stages / "picture.png").stat().st_size > 0


def test_the_cards_snippet_for_a_style_draws_with_both_adapters(stages: Path, base_folder: Path):
    package(stages, base_folder)
    folder = stages / "release/mini"
    snippet = (folder / "README.md").read_text().split("```python\n")[2].split("```")[0]
    for place in ("path/to/this/folder", "path/to/a/style"):
        snippet = snippet.replace(place, str(folder))
    names: dict[str, Any] = {}
    exec(snippet.replace('"picture.png"', repr(str(stages / "picture.png"))), names)
    assert names["pipe"].get_active_adapters() == ["lcm", "style"]
    assert (stages / "picture.png").stat().st_size > 0


def test_an_adapter_saved_by_diffusers_itself_is_packaged(base: LoadedBase, base_folder: Path, tmp_path: Path):
    write_stages(base, tmp_path)
    layers = get_peft_model_state_dict(base.network, adapter_name=lora.ADAPTER)
    # What diffusers writes says nothing of alpha 8 over rank 4.
    doubled = {name: 2 * t if ".lora_B." in name else t for name, t in layers.items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "adapters/mini", unet_lora_layers=doubled)
    assert package(tmp_path, base_folder)["reloaded"]["error"] < 1e-5


def test_weights_that_differ_from_the_live_student_are_not_released(stages: Path, base_folder: Path):
    weights = stages / "adapters/mini" / WEIGHTS
    tensors = load_file(weights)
    save_file({n: t * 1.1 if ".lora_B." in n else t for n, t in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"output is \d\.\de-0\d of the largest value away .* less than 0.0001"):
        package(stages, base_folder)
    assert not (stages / "release/mini").exists()


def test_weights_of_which_a_part_is_lost_on_the_way_are_not_released(stages: Path, base_folder: Path):
    weights = stages / "adapters/mini" / WEIGHTS
    tensors = load_file(weights)
    lost = sorted(tensors)[:2]
    renamed = {(n.replace("unet.", "unet.nowhere.") if n in lost else n): t for n, t in tensors.items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds nowhere\.\S+, which this base does not have"):
        package(stages, base_folder)


def test_an_adapter_without_effect_is_not_released(base: LoadedBase, base_folder: Path, tmp_path: Path):
    write_stages(base, tmp_path, strength=0.0)
    with pytest.raises(UserError, match="has no effect"):
        package(tmp_path, base_folder)


def test_an_adapter_of_another_base_is_not_released(stages: Path, base_folder: Path):
    weights = stages / "adapters/mini" / WEIGHTS
    tensors = load_file(weights)
    grown = {n: torch.zeros(t.shape[0], t.shape[1] + 1, *t.shape[2:]) for n, t in tensors.items() if ".lora_A." in n}
    save_file(tensors | grown, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"and this base takes \(4, 8, 3, 3\) .*: it was made for another base"):
        package(stages, base_folder)


def test_a_scheduler_with_another_prediction_type_is_refused(stages: Path, base_folder: Path):
    path = stages / "adapters/mini/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match=r"prediction_type is 'v_prediction', the base in .* has 'epsilon'"):
        package(stages, base_folder)


def test_a_failing_package_leaves_the_former_bundle_as_it_was(stages: Path, base_folder: Path):
    package(stages, base_folder)
    before = (stages / "release/mini/SHA256SUMS").read_text()
    (stages / "evaluation/mini/grid.png").unlink()
    with pytest.raises(UserError, match=r"grid\.png: no such file"):
        package(stages, base_folder)
    assert (stages / "release/mini/SHA256SUMS").read_text() == before
    assert [path.name for path in (stages / "release").iterdir()] == ["mini"]


def test_verify_names_the_file_that_was_changed_and_the_one_that_is_gone(stages: Path, base_folder: Path):
    package(stages, base_folder)
    folder = stages / "release/mini"
    metrics = folder / "metrics.json"
    metrics.write_bytes(metrics.read_bytes().replace(b"82.5", b"12.5"))
    with pytest.raises(UserError, match=r"metrics\.json: expected sha256"):
        verify(folder)
    metrics.unlink()
    with pytest.raises(UserError, match=r"metrics\.json: is listed in SHA256SUMS and missing"):
        verify(folder)
    with pytest.raises(UserError, match="is no release"):
        verify(stages)


def test_the_bundle_loads_in_a_fresh_pipeline_with_its_own_scheduler(stages: Path, base_folder: Path):
    package(stages, base_folder)
    pipeline = DiffusionPipeline.from_pretrained(base_folder)
    pipeline.load_lora_weights(stages / "release/mini")
    trained = load_file(stages / "adapters/mini" / WEIGHTS)
    layers = [(n, m) for n, m in pipeline.unet.named_modules() if hasattr(m, "lora_B")]
    assert len(layers) == len(trained) / 2
    for name, layer in layers:
        up = layer.lora_B["default_0"].weight * layer.scaling["default_0"]
        assert torch.equal(up, trained[f"unet.{name}.lora_B.weight"])
    pipeline.scheduler = LCMScheduler.from_pretrained(stages / "release/mini")
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 759, 499, 259]
