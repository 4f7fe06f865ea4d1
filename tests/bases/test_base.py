import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from lcmlora import bases
from lcmlora.config import Base
from lcmlora.errors import UserError
from tests.support.miniature import ARCHITECTURES, RESOLUTION, SDXL_FAMILY, save_base

CAPTIONS = ["red apple", "tree"]


def _settings(source: str | Path, **changes: object) -> Base:
    return Base.model_validate({"source": str(source), "resolution": RESOLUTION, "license": "mit"} | changes)


def _load(folder: Path, parts: tuple[str, ...] = ("network", "vae", "text"), **changes: object) -> bases.LoadedBase:
    return bases.load("mine", _settings(folder, **changes), folder, device=torch.device("cpu"), parts=parts)


def _changed(folder: Path, to: Path, file: str, **changes: object) -> Path:
    """Copies a base with some keys of one of its JSON files changed."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def _encode(pipeline: Any, captions: list[str]) -> tuple[torch.Tensor, ...]:
    """Returns the pipeline's own embeddings: conditional, unconditional and, for SDXL, the pooled ones of both."""
    return pipeline.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)


def test_a_loaded_base_is_frozen_and_knows_its_schedule_and_latents(base: bases.LoadedBase):
    assert (base.family.name, base.schedule.prediction_type, base.latent_shape) == ("sd", "epsilon", (4, 8, 8))
    assert base.schedule.alpha.shape == (1000,) and base.schedule.alpha.dtype == torch.float32
    modules = (base.network, base.vae, *base.text_encoders)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)


def test_the_prediction_type_is_the_bases_own(tmp_path: Path):
    folder = save_base(tmp_path / "v", prediction_type="v_prediction")
    loaded = bases.load("v", _settings(folder), folder, device=torch.device("cpu"), parts=())
    assert loaded.schedule.prediction_type == "v_prediction"
    assert loaded.network is None and loaded.vae is None and not loaded.text_encoders


@pytest.mark.parametrize("architecture", ("mini", *ARCHITECTURES))
def test_text_and_forward_equal_the_diffusers_pipelines_own(miniatures: Callable[[str], Path], architecture: str):
    folder = miniatures(architecture)
    base, pipeline = _load(folder), DiffusionPipeline.from_pretrained(folder)
    theirs, empty, *pooled = _encode(pipeline, CAPTIONS)
    ours, unconditional = base.encode_text(CAPTIONS), base.unconditional()
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs)
    torch.testing.assert_close(unconditional["encoder_hidden_states"], empty[:1])
    added = {}
    if architecture in SDXL_FAMILY:
        assert (base.family.name, ours["text_embeds"].shape) == ("sdxl", (2, 12))
        torch.testing.assert_close(ours["text_embeds"], pooled[0])
        torch.testing.assert_close(unconditional["text_embeds"], pooled[1][:1])
        assert all(not value.any() for value in unconditional.values())
        added = {"text_embeds": pooled[0], **base.micro_conditioning(rows=2)}
        ours |= base.micro_conditioning(rows=2)
    else:
        assert (base.family.name, ours.keys()) == ("sd", {"encoder_hidden_states"})
        assert unconditional["encoder_hidden_states"].any()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        expected = pipeline.unet(x, t, theirs, added_cond_kwargs=added).sample
    torch.testing.assert_close(base.predict(x, t, ours), expected)


def test_an_sdxl_base_without_forced_zeros_has_the_empty_prompt(miniatures: Callable[[str], Path], tmp_path: Path):
    index = {"force_zeros_for_empty_prompt": False}
    folder = _changed(miniatures("sdxl"), tmp_path / "sdxl", "model_index.json", **index)
    _, empty, _, pooled = _encode(DiffusionPipeline.from_pretrained(folder), CAPTIONS)
    ours = _load(folder, parts=("text",)).unconditional()
    torch.testing.assert_close(ours["encoder_hidden_states"], empty[:1])
    torch.testing.assert_close(ours["text_embeds"], pooled[:1])
    assert ours["text_embeds"].any()


@pytest.mark.parametrize(
    ("architecture", "scale"), [("mini", 0.5), ("sd15", 0.18215), ("sd2", 0.18215), ("sdxl", 0.13025)]
)
def test_latents_carry_the_scaling_factor_both_ways(miniatures: Callable[[str], Path], architecture: str, scale: float):
    folder = miniatures(architecture)
    base, vae = _load(folder, parts=("vae",)), DiffusionPipeline.from_pretrained(folder).vae
    pictures = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    mean, logvar = base.encode_pictures(pictures)
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
        torch.testing.assert_close(mean, posterior.mean * scale)
        torch.testing.assert_close((0.5 * logvar).exp(), posterior.std * scale, atol=1e-6, rtol=1e-4)
        expected = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(base.decode(mean), expected)


@pytest.mark.parametrize(
    ("architecture", "predicts"),
    [("sd15", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon"), ("ssd1b", "epsilon")],
)
def test_schedules_of_every_class_are_read_alike(miniatures: Callable[[str], Path], architecture: str, predicts: str):
    base = _load(miniatures(architecture), parts=())
    assert base.schedule.prediction_type == predicts
    # PNDM, DDIM and Euler; the last of Stable Diffusion's alphas_cumprod.
    assert base.schedule.alpha[-1].square().item() == pytest.approx(0.00466, abs=1e-6)


@pytest.mark.parametrize("architecture", ["sd2", "sdxl"])
def test_a_schedule_that_ends_in_pure_noise_is_rescaled(tmp_path: Path, architecture: str):
    plain = _load(save_base(tmp_path / "plain", architecture), parts=()).schedule.alpha.double()
    folder = save_base(tmp_path / "zero", architecture, prediction_type="v_prediction", zero_snr=True)
    base = _load(folder, parts=())
    # arXiv 2305.08891, Algorithm 1: shifted to end at 0 and scaled to begin where it did.
    rescaled = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(base.schedule.alpha.double().square(), rescaled.square(), atol=1e-5, rtol=1e-3)
    assert base.schedule.alpha[-1].item() == 0
    v, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    assert torch.equal(base.schedule.prediction(v, noise, torch.tensor([999])).x0, -v)


def test_epsilon_on_a_schedule_that_ends_in_pure_noise_is_refused(tmp_path: Path):
    folder = save_base(tmp_path / "mine", "sdxl", prediction_type="epsilon", zero_snr=True)
    with pytest.raises(UserError, match=r"scheduler_config.json: prediction_type is epsilon .* pure noise"):
        _load(folder, parts=())


def test_a_schedule_of_flow_matching_is_refused(base_folder: Path, tmp_path: Path):
    shutil.copytree(base_folder, tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow" / "scheduler")
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        _load(tmp_path / "flow", parts=())


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("vae/config.json", "shift_factor", 0.1, "vae/config.json: shift_factor is set"),
        ("vae/config.json", "latents_mean", [0.1] * 4, "vae/config.json: latents_mean is set"),
        ("unet/config.json", "in_channels", 9, "in_channels is 9 and the VAE's latents have 4"),
    ],
)
def test_latents_that_plain_stable_diffusion_does_not_have_are_refused(
    base_folder: Path, tmp_path: Path, file: str, key: str, value: object, message: str
):
    with pytest.raises(UserError, match=message):
        _load(_changed(base_folder, tmp_path / "mine", file, **{key: value}), parts=())


@pytest.mark.parametrize("architecture", ["mini", "sdxl"])
def test_a_folder_of_fp16_files_loads_as_its_variant(tmp_path: Path, architecture: str):
    folder = save_base(tmp_path / "mine", architecture, variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert (folder / "text_encoder" / "model.fp16.safetensors").is_file()
    base = _load(folder, variant="fp16")
    pipeline = DiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float32)
    torch.testing.assert_close(base.encode_text(CAPTIONS)["encoder_hidden_states"], _encode(pipeline, CAPTIONS)[0])
    assert {p.dtype for p in base.network.parameters()} == {torch.float32}
    for ours, theirs in zip(base.network.parameters(), pipeline.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_a_missing_variant_is_refused_by_its_key(base_folder: Path, tmp_path: Path, part: str):
    with pytest.raises(UserError, match=r"bases.mine.variant: .*has no fp16 file, but .*safetensors; remove the key"):
        _load(base_folder, parts=(part,), variant="fp16")
    folder = save_base(tmp_path / "mine", variant="fp16")
    with pytest.raises(UserError, match=r"bases.mine.variant: .*fp16.safetensors alone; set the key"):
        _load(folder, parts=(part,))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_refused_by_name(base_folder: Path, tmp_path: Path, part: str):
    folder = tmp_path / "broken"
    shutil.copytree(base_folder, folder)
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"broken: a diffusers base needs {part}/, and there is none"):
        bases.load("x", _settings(folder), folder, device=torch.device("cpu"))


def test_weights_that_cannot_be_read_are_refused_by_name(base_folder: Path, tmp_path: Path):
    folder = tmp_path / "broken"
    shutil.copytree(base_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"broken/unet: has no diffusion_pytorch_model.safetensors; get"):
        bases.load("x", _settings(folder), folder, device=torch.device("cpu"), parts=("network",))


@pytest.mark.parametrize("architecture", SDXL_FAMILY)
def test_micro_conditioning_is_height_before_width(miniatures: Callable[[str], Path], architecture: str):
    base = _load(miniatures(architecture), parts=())
    ours = base.micro_conditioning(torch.tensor([[480, 640]]), torch.tensor([[0, 80]]))["time_ids"]
    assert ours.tolist() == [[480, 640, 0, 80, RESOLUTION, RESOLUTION]]
    assert (
        base.micro_conditioning(rows=2)["time_ids"].tolist()
        == [[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * 2
    )
    pipeline = DiffusionPipeline.from_pretrained(miniatures(architecture))
    height_width, top_left = (480, 640), (0, 80)
    theirs = pipeline._get_add_time_ids(height_width, top_left, (RESOLUTION, RESOLUTION), torch.float32, 12)
    assert ours.tolist() == theirs.tolist()


# What the presets' hub repositories hold, from listings of their files.
def test_a_device_that_the_machine_lacks_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="device: cuda, and this machine has no usable GPU"):
        bases.pick_device("cuda")
    assert bases.pick_device("auto").type == "cpu"
    assert bases.pick_dtype("auto", torch.device("cpu")) == torch.float32
