import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lcmlora import bases
from lcmlora.config import Base
from lcmlora.errors import UserError
from tests.miniature import RESOLUTION, save_base


def _settings(source: str | Path, **changes: object) -> Base:
    return Base.model_validate({"source": str(source), "resolution": RESOLUTION, "license": "mit"} | changes)


def test_a_loaded_base_is_frozen_and_knows_its_schedule_and_latents(base: bases.LoadedBase):
    assert (base.kind, base.prediction_type, base.latent_shape) == ("sd", "epsilon", (4, 8, 8))
    assert base.alphas_cumprod.shape == (1000,) and base.alphas_cumprod.dtype == torch.float32
    modules = (base.unet, base.vae, *base.text_encoders)
    assert not any(p.requires_grad for m in modules for p in m.parameters())
    assert not any(m.training for m in modules)


def test_the_prediction_type_is_the_bases_own(tmp_path: Path):
    folder = save_base(tmp_path / "v", prediction_type="v_prediction")
    loaded = bases.load("v", _settings(folder), folder, device=torch.device("cpu"), parts=())
    assert loaded.prediction_type == "v_prediction"
    assert loaded.unet is None and loaded.vae is None and not loaded.text_encoders


def test_text_and_forward_equal_the_diffusers_pipeline(base: bases.LoadedBase, base_folder: Path):
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder)
    theirs, empty = pipeline.encode_prompt(["red apple", "tree"], "cpu", 1, True)
    ours = base.encode_text(["red apple", "tree"])
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs)
    torch.testing.assert_close(base.unconditional()["encoder_hidden_states"], empty[:1])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        torch.testing.assert_close(base.predict(x, t, ours), pipeline.unet(x, t, theirs).sample)


def test_latents_carry_the_scaling_factor_both_ways(base: bases.LoadedBase, base_folder: Path):
    vae = StableDiffusionPipeline.from_pretrained(base_folder).vae
    pictures = torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    mean, logvar = base.encode_pictures(pictures)
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
        torch.testing.assert_close(mean, posterior.mean * 0.5)  # the miniature's scaling_factor
        torch.testing.assert_close((0.5 * logvar).exp(), posterior.std * 0.5, atol=1e-6, rtol=1e-4)
        expected = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(base.decode(mean), expected)


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
    with pytest.raises(UserError, match=r"broken/unet: cannot be loaded"):
        bases.load("x", _settings(folder), folder, device=torch.device("cpu"), parts=("unet",))


def test_fetch_links_a_local_folder_once_and_follows_a_change(base_folder: Path, tmp_path: Path):
    root = tmp_path / "bases"
    for _ in range(2):
        folder = bases.fetch("mine", _settings(base_folder), root)
    assert folder == root / "mine" and folder.resolve() == base_folder.resolve()
    other = save_base(tmp_path / "other")
    assert bases.fetch("mine", _settings(other), root).resolve() == other.resolve()


def test_fetch_never_replaces_a_folder_that_stands_in_the_way(base_folder: Path, tmp_path: Path):
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="is in the way of the link"):
        bases.fetch("mine", _settings(base_folder), tmp_path / "bases")


def test_fetch_wants_a_pinned_revision_for_a_hub_id_and_a_whole_folder(tmp_path: Path):
    with pytest.raises(UserError, match="some/model is a hub id and needs a pinned commit"):
        bases.fetch("mine", _settings("some/model"), tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such base folder"):
        bases.fetch("mine", _settings("./nowhere"), tmp_path)


def test_the_identity_changes_with_the_weights(base_folder: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(base_folder, folder)
    before = bases.identity(_settings(folder), folder)
    assert before == bases.identity(_settings(folder), base_folder) | {"source": str(folder)}
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"changed": 1}))
    assert bases.identity(_settings(folder), folder)["digest"] != before["digest"]


def test_micro_conditioning_is_height_before_width(base: bases.LoadedBase):
    sizes, crops = torch.tensor([[480, 640]]), torch.tensor([[0, 80]])
    assert base.time_ids(sizes, crops).tolist() == [[480, 640, 0, 80, RESOLUTION, RESOLUTION]]
    assert base.time_ids(rows=2).tolist() == [[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * 2


def test_asking_for_a_gpu_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="cuda was asked for"):
        bases.pick_device("cuda")
    assert bases.pick_device("auto").type == "cpu"
    assert bases.pick_dtype("auto", torch.device("cpu")) == torch.float32
