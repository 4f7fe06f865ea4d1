"""Bases with a style's LoRA summed into them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.bases import fetching, folders
from lcmlora.config import Base, Merged
from lcmlora.diffusion.sampling import text_conditioning
from lcmlora.errors import UserError
from lcmlora.inference import pipelines
from tests.support.miniature import RESOLUTION, save_base

CPU = torch.device("cpu")


def _settings(source: Path, style: Path | None = None, weight: float = 0.5, variant: str | None = None) -> Base:
    merged = Merged(source=str(style), weight=weight) if style else None
    return Base(source=str(source), resolution=RESOLUTION, license="mit", style=merged, variant=variant)


def _load(folder: Path, variant: str | None = None) -> bases.LoadedBase:
    return bases.load("mine", _settings(folder, variant=variant), folder, device=CPU)


def _style(base_folder: Path, folder: Path, variant: str | None = None) -> Path:
    unet = _load(base_folder, variant).network
    for name, parameter in lora.inject(unet, 4, 4.0, 0).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    folder.mkdir(parents=True)
    metadata = lora.adapter_metadata(4)
    lora.save_file(lora.state_dict(unet), folder / lora.WEIGHTS, dtype=torch.float32, metadata=metadata)
    return folder


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_a_styled_base_draws_as_the_base_with_the_lora_at_its_weight(
    miniatures: Callable[[str], Path], tmp_path: Path, architecture: str
):
    plain = miniatures(architecture)
    style = _style(plain, tmp_path / "style")
    found = fetching.fetch("mine", _settings(plain, style), tmp_path / "bases")
    assert found == tmp_path / "bases/mine" and not found.is_symlink()
    base, merged = _load(plain), _load(found)
    text = text_conditioning(base, ["red apple"])
    x, t = torch.randn(1, *base.latent_shape), torch.tensor([500])
    tensors = load_file(style / lora.WEIGHTS)
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name] *= 0.5
    lora.save_file(tensors, tmp_path / "half.safetensors", dtype=torch.float32, metadata=lora.adapter_metadata(4))
    with torch.no_grad():
        alone = base.predict(x, t, text)
        lora.load(base.network, tmp_path / "half.safetensors")
        torch.testing.assert_close(merged.predict(x, t, text), base.predict(x, t, text), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(merged.predict(x, t, text), alone, atol=1e-3)
    assert torch.equal(merged.encode_text(["tree"])["encoder_hidden_states"],
                       base.encode_text(["tree"])["encoder_hidden_states"])  # fmt: skip


def test_a_styled_base_in_half_precision_stays_in_half_precision(tmp_path: Path):
    plain = save_base(tmp_path / "plain", "sd15", variant="fp16")
    style = _style(plain, tmp_path / "style", "fp16")
    found = fetching.fetch("mine", _settings(plain, style, variant="fp16"), tmp_path / "bases")
    (weights,) = (found / "unet").glob("*.fp16.safetensors")
    assert {t.dtype for t in load_file(weights).values()} == {torch.float16}
    _load(found, "fp16")


def test_a_styled_base_is_made_once_and_again_after_a_change(base_folder: Path, tmp_path: Path):
    style, root = _style(base_folder, tmp_path / "style"), tmp_path / "bases"
    weights = fetching.fetch("mine", _settings(base_folder, style), root) / "unet/diffusion_pytorch_model.safetensors"
    first = weights.stat().st_mtime_ns
    fetching.fetch("mine", _settings(base_folder, style), root)
    assert weights.stat().st_mtime_ns == first
    digest = folders.identity(_settings(base_folder, style), root / "mine")["digest"]
    heavier = _settings(base_folder, style, 1.0)
    assert folders.identity(heavier, fetching.fetch("mine", heavier, root))["digest"] != digest
    assert folders.identity(heavier, root / "mine")["style"] == f"{style} at 1"
    assert fetching.fetch("mine", _settings(base_folder), root).is_symlink()  # without the style it is the base again
    assert not fetching.fetch("mine", heavier, root).is_symlink()


def test_a_styled_base_is_made_again_after_a_change_of_any_part_of_its_base(base_folder: Path, tmp_path: Path):
    plain = shutil.copytree(base_folder, tmp_path / "plain")
    settings = _settings(plain, _style(plain, tmp_path / "style"))
    weights = fetching.fetch("mine", settings, tmp_path / "bases") / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(plain / "vae/diffusion_pytorch_model.safetensors")
    tensors["quant_conv.bias"] += 1
    save_file(tensors, plain / "vae/diffusion_pytorch_model.safetensors")
    fetching.fetch("mine", settings, tmp_path / "bases")
    assert torch.equal(load_file(weights)["quant_conv.bias"], tensors["quant_conv.bias"])


def test_a_style_that_does_not_fit_the_base_is_refused(
    base_folder: Path, miniatures: Callable[[str], Path], tmp_path: Path
):
    with pytest.raises(UserError, match=r"bases\.mine\.style\.source: .*nowhere: no such file"):
        fetching.fetch("mine", _settings(base_folder, tmp_path / "nowhere"), tmp_path / "bases")
    other = _style(miniatures("sdxl"), tmp_path / "style")
    with pytest.raises(UserError, match=r"which this base does not have|made for another base"):
        fetching.fetch("mine", _settings(base_folder, other), tmp_path / "bases")
    assert not (tmp_path / "bases/mine").exists()
    (tmp_path / "bases/full").mkdir()
    with pytest.raises(UserError, match="bases/full is in the way"):
        fetching.fetch("full", _settings(base_folder, _style(base_folder, tmp_path / "own")), tmp_path / "bases")


def test_a_change_of_the_style_changes_the_state_of_the_base(base_folder: Path, tmp_path: Path):
    style = _style(base_folder, tmp_path / "style")
    before = fetching.base_state("mine", _settings(base_folder, style))
    (style / lora.WEIGHTS).write_bytes(b"other")
    assert fetching.base_state("mine", _settings(base_folder, style)) != before


def test_a_release_of_a_styled_base_needs_the_bases_folder(tmp_path: Path):
    made_for = {"source": "team/base", "revision": "0" * 40, "digest": "1" * 64, "style": "ink at 0.5"}
    with pytest.raises(UserError, match=r"made for team/base with the style ink at 0\.5 added to it; name the folder"):
        pipelines._base_folder(tmp_path, made_for, None, tmp_path)
