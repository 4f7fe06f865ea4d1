"""A family of bases is one class in a table: a family of another package is fetched, loaded, encoded and trained."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lcmlora import bases
from lcmlora.adapters import formats, lora
from lcmlora.bases import architecture, families, fetching
from lcmlora.bases.schedule import PREDICTION_TYPES
from lcmlora.config import Base
from lcmlora.distillation.loss import Distillation, add_adapter
from lcmlora.errors import UserError
from lcmlora.plugins import FAMILIES
from tests.conftest import make_latents
from tests.support.distillation import SETTINGS, draw_batch, load_parts
from tests.support.families import FLOW, FlowTransformer, save_flow_transformer
from tests.support.miniature import RESOLUTION

CPU = torch.device("cpu")


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fetched base of a family that the table has for this test alone."""
    monkeypatch.setattr(FAMILIES, "_classes", dict(FAMILIES._classes))
    FAMILIES.register("flow-transformer", FlowTransformer)
    monkeypatch.setitem(PREDICTION_TYPES, "flow", FLOW)
    made = save_flow_transformer(tmp_path / "made", base_folder)
    return fetching.fetch("mine", Base(source=str(made), resolution=RESOLUTION, license="mit"), tmp_path / "bases")


def test_a_family_is_added_in_a_class_and_trained(folder: Path, tmp_path: Path):
    base = load_parts(folder, "network", "text")
    assert base.family.name == "flow-transformer"
    assert base.encode_text(["a red apple"])["encoder_hidden_states"].shape == (1, 24, 16)
    cache = make_latents(folder, tmp_path)
    optimization = add_adapter(base, SETTINGS)
    distillation = Distillation(base, cache.unconditional(), SETTINGS)
    losses = distillation.losses(draw_batch(cache), optimization)
    losses.mean().backward()
    assert losses.isfinite().all() and losses.shape == (SETTINGS.batch,)
    trained = dict(base.network.named_parameters())
    assert all(trained[name].grad.any() for name in trained if "lora_B" in name)
    lora.save_file(lora.state_dict(base.network, base.family.placement), tmp_path / "a.safetensors",
                   dtype=torch.float32, metadata=lora.adapter_metadata(4, base.family.placement))  # fmt: skip
    read = formats.read(tmp_path / "a.safetensors", architecture.of_folder(folder))
    assert len(read.layers) == lora.adapted_layers(base.network) == 9
    described = bases.describe("mine", Base(source=str(folder), resolution=16, license="mit"), folder, 4, 4)
    assert (described.adapted_layers, described.lora_parameters) == (9, lora.parameters(base.network))


def test_the_jump_of_a_flow_is_diffusers_euler_step(folder: Path):
    schedule, config = FlowTransformer().schedule(folder, RESOLUTION)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    assert torch.equal(schedule.sigma.flip(0), scheduler.sigmas)
    scheduler.set_timesteps(1000)
    x, output = torch.randn(2, 1, 4, 8, 8)
    t, below = torch.tensor([999]), torch.tensor([998])
    jumped = schedule.state(*schedule.prediction(output, x, t), below)
    step = (schedule.sigma[998] - schedule.sigma[999]) * output
    torch.testing.assert_close(jumped, x + step, atol=1e-6, rtol=1e-5)


def test_without_its_class_the_folder_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FAMILIES, "_classes", {})
    with pytest.raises(UserError, match=r"needs unet/, and there is none: its network is a transformer"):
        load_parts(folder, "network")
    with pytest.raises(UserError, match=r"a base's family: got 'flow-transformer': expected one of sd, sdxl"):
        families.by_name("flow-transformer")
