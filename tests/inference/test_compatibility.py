import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lcmlora import bases, config, stages
from lcmlora.config import Compatibility, Gate
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons import compatibility as figures
from lcmlora.evaluation.figures import FeatureSet, Key, Metrics
from lcmlora.evaluation.gate import gate_failures
from lcmlora.inference import compatibility
from lcmlora.inference.additions import Int8Weights, _rounded_to_int8, additions_of
from lcmlora.inference.compatibility import Inputs, try_additions
from lcmlora.project import Project
from tests.evaluation.conftest import made_of
from tests.inference.test_editing import save_controlnet
from tests.stages import inputs
from tests.stages.inputs import EVALUATION
from tests.support.releases import METRICS, settings, write_stages

NOT_TRIED = {"img2img": (), "int8": False, "fp16_vae": False}
IP_ADAPTER = "ip-adapter_sd15.safetensors"


@pytest.fixture(scope="module")
def made(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> inputs.Inputs:
    return inputs.make(tmp_path_factory.mktemp("inputs"), base_folder)


def reading(made: inputs.Inputs, base: Path, root: Path, **changes: Any) -> Inputs:
    """What the stage reads: an adapter of this base, and the settings with these changes."""
    if not (root / "adapters/mini").exists():
        entry = made_of(base)
        write_stages(bases.load("mini", entry, base, device=torch.device("cpu")), root)
    return Inputs(
        model="mini",
        base=made_of(base),
        base_folder=base,
        adapter=Project(root).adapter("mini"),
        data=made.data,
        pictures=made.pictures,
        evaluation=EVALUATION,
        settings=Compatibility(steps=(2,), pictures=16, **NOT_TRIED | changes),
        root=root,
    )


def tried(given: Inputs, root: Path) -> figures.Compatibility:
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    return try_additions(given, scratch, root / "compatibility/mini.json")


def save_ip_adapter(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Writes an IP-Adapter for this UNet in the published layout, with an image encoder in miniature."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=8,
    )  # fmt: skip
    models = folder / "models"
    CLIPVisionModelWithProjection(vision).save_pretrained(models / "image_encoder")
    width, tokens = unet.config.cross_attention_dim, 4
    weights = {
        "image_proj.proj.weight": torch.randn(tokens * width, vision.projection_dim),
        "image_proj.proj.bias": torch.zeros(tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossing):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("k", "v"):
            weights[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(channels, width)
    save_file(weights, models / IP_ADAPTER)
    return folder


def test_a_controlnet_and_an_ip_adapter_are_drawn_with(made: inputs.Inputs, base_folder: Path, tmp_path: Path):
    save_controlnet(base_folder, tmp_path / "edges")
    unet = StableDiffusionPipeline.from_pretrained(base_folder).unet
    save_ip_adapter(unet, tmp_path / "faces")
    added = {"controlnets": {"edges": {"source": "edges"}}, "ip_adapters": {"faces": {"source": "faces"}}}
    found = tried(reading(made, base_folder, tmp_path, **added), tmp_path)
    assert list(found.tried) == ["nothing", "controlnet edges", "ip-adapter faces"]
    plain = found.tried["nothing"].cells[Key("student@2")]
    for name in ("controlnet edges", "ip-adapter faces"):
        cell = found.tried[name].cells[Key("student@2")]
        assert cell.excess is not None and cell.excess != plain.excess  # the addition does something
        assert found.tried[name].floor != found.tried["nothing"].floor
    assert figures.Compatibility.read(tmp_path / "compatibility/mini.json") == found


@pytest.mark.slow
def test_the_additions_of_an_sdxl_base_are_drawn_with(
    made: inputs.Inputs, miniatures: Callable[[str], Path], tmp_path: Path
):
    base = miniatures("sdxl")
    save_controlnet(base, tmp_path / "edges")
    added = {"controlnets": {"edges": {"source": "edges", "picture": "picture"}}, "img2img": (0.5,), "int8": True}
    found = tried(reading(made, base, tmp_path, inpainting=True, fp16_vae=True, **added), tmp_path)
    assert list(found.tried) == ["nothing", "img2img 0.5", "inpainting", "controlnet edges", "int8", "fp16-vae"]
    assert all(tried.cells[Key("student@2")].excess is not None for tried in found.tried.values())


@pytest.mark.slow
def test_a_run_that_was_killed_draws_no_batch_twice(
    made: inputs.Inputs, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = reading(made, base_folder, tmp_path, int8=True)
    drawn: list[str] = []
    teacher, student = compatibility._Drawing._by_teacher, compatibility._Drawing._by_student

    def counted(draw: Any) -> Any:
        def drawing(self: Any, addition: Any, *rest: Any) -> Any:
            if len(drawn) == 7:
                raise KeyboardInterrupt
            drawn.append(addition.name)
            return draw(self, addition, *rest)

        return drawing

    monkeypatch.setattr(compatibility._Drawing, "_by_teacher", counted(teacher))
    monkeypatch.setattr(compatibility._Drawing, "_by_student", counted(student))
    with pytest.raises(KeyboardInterrupt):
        tried(given, tmp_path)
    monkeypatch.undo()
    drawn_again: list[str] = []
    for name, draw in (("_by_teacher", teacher), ("_by_student", student)):
        monkeypatch.setattr(
            compatibility._Drawing,
            name,
            lambda self, addition, *rest, draw=draw: drawn_again.append(addition.name) or draw(self, addition, *rest),
        )
    resumed = tried(given, tmp_path)
    batches = 2 * 3 * -(-16 // EVALUATION.batch)  # of two additions, three sets each
    assert len(drawn) + len(drawn_again) == batches
    assert not (tmp_path / "scratch").exists()
    monkeypatch.undo()
    assert tried(given, tmp_path) == resumed


def test_what_is_not_finite_fails_and_ends_nothing(made: inputs.Inputs, base_folder: Path, tmp_path: Path):
    base = tmp_path / "base"
    for path in (path for path in base_folder.rglob("*") if path.is_file()):
        (base / path.relative_to(base_folder)).parent.mkdir(parents=True, exist_ok=True)
        (base / path.relative_to(base_folder)).write_bytes(path.read_bytes())
    weights = next((base / "vae").glob("*.safetensors"))
    changed = load_file(weights)
    changed["decoder.conv_in.weight"] *= 1e5  # as SDXL's first VAE: numbers that fp16 does not hold
    save_file(changed, weights, metadata={"format": "pt"})
    found = tried(reading(made, base, tmp_path, fp16_vae=True), tmp_path)
    cell = found.tried["fp16-vae"].cells[Key("student@2")]
    assert cell == figures.Cell(failed="even the teacher draws pictures that are not finite in torch.float16")
    assert found.tried["nothing"].cells[Key("student@2")].excess is not None
    assert list(found.failures) == [("fp16-vae", "student@2", cell.failed)]


def test_steps_that_a_strength_does_not_leave_fail_and_the_others_are_drawn(
    made: inputs.Inputs, base_folder: Path, tmp_path: Path
):
    given = reading(made, base_folder, tmp_path, img2img=(0.06,))
    given = replace(
        given,
        settings=given.settings.model_copy(update={"steps": (2, 4)}),
        evaluation=given.evaluation.model_copy(update={"teacher_steps": 20}),
    )
    cells = tried(given, tmp_path).tried["img2img 0.06"].cells
    assert cells[Key("student@2")].excess is not None
    assert "at strength 0.06" in (cells[Key("student@4")].failed or "") and cells[Key("student@4")].excess is None

    fewer = replace(given, evaluation=given.evaluation.model_copy(update={"teacher_steps": 6}))
    cell = tried(fewer, tmp_path).tried["img2img 0.06"].cells[Key("student@2")]
    assert cell == figures.Cell(failed="the teacher's 6 steps leave none at strength 0.06")


def test_what_needs_pictures_is_left_out_where_there_are_only_prompts(
    made: inputs.Inputs, base_folder: Path, tmp_path: Path
):
    given = reading(made, base_folder, tmp_path, img2img=(0.5,), int8=True)
    found = tried(replace(given, data=given.data.model_copy(update={"source": "prompts"})), tmp_path)
    assert list(found.tried) == ["nothing", "int8"]
    assert found.left_out == {"img2img 0.5": "the data are prompts, without real pictures"}


def test_int8_has_one_scale_for_each_output_channel_and_changes_nothing_twice():
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-3, 3, 6).reshape(6, 1, 1, 1)
    rounded = _rounded_to_int8(weight)
    largest = weight.flatten(1).abs().amax(dim=1)
    error = (rounded - weight).flatten(1).abs().amax(dim=1)
    assert (error <= largest / 127 / 2 * 1.001).all() and (error > 0).all()
    assert all(len(row.unique()) <= 255 for row in rounded)
    assert torch.allclose(_rounded_to_int8(rounded), rounded)
    assert Int8Weights().facts == {}


def test_a_missing_file_is_named_before_anything_is_drawn(tmp_path: Path):
    settings = Compatibility(loras={"ink": {"source": "ink.safetensors"}})
    with pytest.raises(UserError, match=r"compatibility\.loras\.ink\.source: .*ink\.safetensors: no such file"):
        additions_of(settings, tmp_path)


def found_with(**cells: figures.Cell) -> figures.Compatibility:
    """Figures in which each addition has this cell at four steps, under these names."""
    features = FeatureSet(name="quarters", dimensions=12)
    rows = {
        name: figures.Tried(kind="nothing", title=name, added={}, cells={Key("student@4"): cell})
        for name, cell in cells.items()
    }
    return figures.Compatibility(
        adapter="a", base="b", features=features, pictures=16, prompts=4, seeds={}, teacher_steps=6,
        guidance_scale=4.0, resamples=0, level=0.95, limit=2.0, tried=rows, left_out={"img2img 0.5": "no pictures"},
    )  # fmt: skip


def test_the_gate_asks_for_additions_that_did_not_fail():
    measured = Metrics.parse(json.loads(json.dumps(METRICS)), "metrics")
    found = found_with(nothing=figures.Cell(excess=4.0), int8=figures.Cell(excess=9.0, failed="too far"))

    def lines(*asked: str, given: figures.Compatibility | None = found) -> list[str]:
        gate = Gate(compatible=asked)
        without = gate_failures(measured, Gate())
        return [line for line in gate_failures(measured, gate, given) if line not in without]

    assert lines("nothing") == []
    assert lines("int8") == ["student@4: int8: too far (gate.compatible)"]
    (missing,) = lines("lora ink 1")
    assert missing.endswith("additions that were: int8, at student@4")
    assert lines("img2img 0.5") == ["student@4: img2img 0.5 was not tried (gate.compatible): no pictures"]
    assert "add the model to compatibility.models" in lines("int8", given=None)[0]


def test_an_excess_beyond_the_limit_fails_only_beyond_chance():
    torch.manual_seed(0)
    captions = [f"caption {i % 8}" for i in range(64)]
    teacher, again, near = (torch.randn(64, 4) for _ in range(3))
    sets: dict[str, Any] = {"teacher": teacher, "teacher/again": again}
    key = Key("student@2")
    bootstrap = compatibility.Bootstrap(captions, resamples=200)
    plain = compatibility._Measured(sets | {key: near + 0.3}, "frechet", bootstrap)
    far = compatibility._Measured(sets | {key: near + 2.0}, "frechet", bootstrap)
    same = compatibility._Measured(sets | {key: near + 0.31}, "frechet", bootstrap)
    assert (far.cell(key, plain, 2.0).failed or "").endswith("beyond chance")
    assert same.cell(key, plain, 2.0).failed is None
    assert plain.cell(key, None, 2.0).failed is None


def test_a_changed_file_makes_the_stage_stale_and_a_renamed_one_does_not(base_folder: Path, tmp_path: Path):
    def digests(name: str, content: bytes) -> object:
        (tmp_path / name).write_bytes(content)
        added = {"models": ["mini"], "loras": {"ink": {"source": name}}}
        (tmp_path / "params.yaml").write_text(json.dumps(settings(base_folder, compatibility=added)))
        found = config.load(tmp_path / "params.yaml", tmp_path)
        decisive = stages.decisive_settings(found, stages.Run("compatibility", "mini"))["compatibility"]
        return decisive["files"]

    before = digests("ink.safetensors", b"one")
    assert digests("pen.safetensors", b"one") == before
    assert digests("ink.safetensors", b"two") != before


def test_only_models_of_the_project_are_tried(base_folder: Path):
    with pytest.raises(ValueError, match=r"compatibility\.models: 'other' is not among models"):
        config.Config.model_validate(settings(base_folder, compatibility={"models": ["other"]}))
