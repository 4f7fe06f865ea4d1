"""What is counted without numbers, against real bases and real steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.memory import held_storages, most_allocated
from lcmlora import bases
from lcmlora.bases import LoadedBase
from lcmlora.bases.families import sdxl, stable_diffusion
from lcmlora.bases.families.stable_diffusion import StableDiffusion
from lcmlora.config import Base, Distill
from lcmlora.distillation.loss import Distillation, add_adapter
from lcmlora.doctor.workload import MetaBase
from lcmlora.errors import UserError
from lcmlora.training.batches import Batch
from tests.support.distillation import SETTINGS
from tests.support.miniature import RESOLUTION

ROOT = Path(__file__).parents[2]
FP32 = torch.float32
NOWHERE = Path("/no/such/folder")


def _settings(source: str, resolution: int) -> Base:
    return Base(source=source, revision="0" * 40, resolution=resolution, license="unknown")


def _samples(base: LoadedBase, rows: int, settings: Distill) -> Batch:
    z = torch.randn(rows, *base.latent_shape)
    captions = base.encode_text(["red apple"])
    conditioning = {k: v.repeat(rows, *(1,) * (v.ndim - 1)) for k, v in captions.items()}
    index = torch.arange(rows) % settings.grid
    w, u = torch.full((rows,), settings.w_min), torch.rand(rows, 2)
    return Batch(range(rows), z, torch.randn_like(z), index, w, u, conditioning | base.micro_conditioning(rows=rows))


def _measured(folder: Path, rows: int, settings: Distill, side: int = RESOLUTION) -> int:
    """Returns the bytes of tensors at the peak of a real step on the CPU, as torch's allocator gives them out."""
    others = sum(held_storages().values())
    base = bases.load("base", _settings(str(folder), side), folder, device=torch.device("cpu"))
    samples = _samples(base, rows, settings)
    optimization = add_adapter(base, settings)
    distillation = Distillation(base, base.unconditional(), settings)
    base.text_encoders = []

    def step(number: int) -> None:
        optimization.backward(distillation.losses(samples, optimization).mean())
        optimization.step(number)

    step(0)
    return most_allocated(lambda: step(1)) - others


@pytest.mark.parametrize(
    "checkpointing", ["none", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("selective", "full"))]
)
def test_a_real_steps_tensors_take_what_was_counted(miniatures: Callable[[str], Path], checkpointing: str):
    folder, rows = miniatures("sdxl"), 24
    settings = SETTINGS.model_copy(update={"batch": rows, "checkpointing": checkpointing})
    base = MetaBase("sdxl", _settings(str(folder), RESOLUTION), folder)
    counted = base.step(settings, rows, FP32, checkpointing=checkpointing).peak
    assert counted == pytest.approx(_measured(folder, rows, settings), rel=0.06)


def test_a_step_of_the_emoji_base_takes_what_was_counted():
    """Of a base that is no miniature, and whose attention, VAE and text encoder are other than the published ones'."""
    folder, rows = ROOT / "bases" / "emoji", 4
    settings = SETTINGS.model_copy(update={"batch": rows, "rank": 64, "checkpointing": "none"})
    base = MetaBase("emoji", _settings(str(folder), 64), folder)
    assert base.text_parameters == sum(p.numel() for p in _text_encoder(folder).parameters())
    counted = base.step(settings, rows, FP32, checkpointing="none").peak
    assert counted == pytest.approx(_measured(folder, rows, settings, 64), rel=0.06)


def _text_encoder(folder: Path) -> Any:
    return CLIPTextModel.from_pretrained(folder / "text_encoder")


def test_operations_and_parameters_of_a_published_base_are_known_without_its_files():
    base = MetaBase("sd15", _settings("stable-diffusion-v1-5/stable-diffusion-v1-5", 512), NOWHERE)
    assert base.parameters == 859_520_964  # docs/scaling.md, F0: counted with attention written out
    assert base.evaluation() == pytest.approx(0.80e12, rel=0.01)
    assert base.vae_parameters == 83_653_863
    assert base.latent_shape == (4, 64, 64) and base.caption_numbers == 77 * 768


def test_the_text_encoders_of_published_bases_have_the_parameters_that_are_counted():
    """By their configurations at stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0."""
    sizes = {
        768: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        1024: {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    }
    for width, known in stable_diffusion.TEXT_PARAMETERS.items():
        assert _parameters(CLIPTextModel, sizes[width]) == known
    second = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    found = _parameters(CLIPTextModelWithProjection, second | {"projection_dim": 1280})
    assert found == sdxl.SECOND_TEXT_PARAMETERS


def _parameters(cls: Any, sizes: dict[str, int]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in cls(CLIPTextConfig(**sizes)).parameters())


def test_a_family_that_does_not_say_what_its_networks_take_is_not_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(StableDiffusion, "input_shapes")
    with pytest.raises(
        UserError, match="the inputs of Stable Diffusion's networks are not known, so nothing is counted"
    ):
        MetaBase("sd15", _settings("stable-diffusion-v1-5/stable-diffusion-v1-5", 512), NOWHERE)
