from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from safetensors.torch import save_file as save_plain

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.errors import UserError
from tests.support.miniature import HUB_IDS, PUBLISHED


@pytest.mark.parametrize(
    ("architecture", "layers", "parameters"),
    [("sd15", 278, 67_252_224), ("ssd1b", 423, 104_902_656), ("sdxl", 788, 196_751_360)],
)
def test_the_adapter_has_the_size_of_the_papers_table_1(architecture: str, layers: int, parameters: int):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[HUB_IDS[architecture]])
        injected = lora.inject(unet, rank=64, alpha=64, seed=0)
    assert lora.adapted_layers(unet) == layers
    assert sum(p.numel() for p in injected.values()) == parameters


def _forward(base: LoadedBase) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    conditioning = {"encoder_hidden_states": torch.randn(2, 5, 16, generator=generator)}
    with torch.no_grad():
        return base.predict(x, torch.tensor([999, 259]), conditioning)


def _trained(base: LoadedBase, alpha: float = 8) -> None:
    """Gives the adapter random weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(2)
    for parameter in lora.inject(base.network, rank=4, alpha=alpha, seed=0).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trainable(base: LoadedBase):
    before = _forward(base)
    parameters = lora.inject(base.network, rank=4, alpha=4, seed=0)
    assert torch.equal(before, _forward(base))
    assert {n for n, p in base.network.named_parameters() if p.requires_grad} == set(parameters)


def test_an_adapter_is_fp32_over_a_half_precision_base(base: LoadedBase):
    base.network.to(torch.bfloat16)
    assert {p.dtype for p in lora.inject(base.network, rank=4, alpha=4, seed=0).values()} == {torch.float32}


def test_disabled_is_the_base_alone_and_ends_with_the_block(base: LoadedBase):
    alone = _forward(base)
    _trained(base)
    student = _forward(base)
    with lora.disabled(base.network):
        with lora.disabled(base.network):
            assert torch.equal(_forward(base), alone)
        assert torch.equal(_forward(base), alone)
    assert torch.equal(_forward(base), student)
    assert not torch.allclose(student, alone, atol=1e-3)


def test_the_file_reloads_with_alpha_folded_and_nothing_lost(base: LoadedBase, base_folder: Path, tmp_path: Path):
    _trained(base, alpha=8)  # scale 2: the case that loses its alpha elsewhere
    student = _forward(base)
    path = tmp_path / lora.WEIGHTS
    tensors = lora.state_dict(base.network)
    lora.save_file(tensors, path, dtype=torch.float32, metadata=lora.adapter_metadata(4))
    assert len(load_file(path)) == 2 * lora.adapted_layers(base.network)

    again = UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet").eval()
    lora.load(again, path)
    base.network = again
    torch.testing.assert_close(_forward(base), student, atol=1e-5, rtol=1e-4)


def test_plain_diffusers_loads_the_file_with_the_same_result(base: LoadedBase, base_folder: Path, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    _trained(base, alpha=8)
    student = _forward(base)
    lora.save_file(
        lora.state_dict(base.network), tmp_path / lora.WEIGHTS, dtype=torch.float32, metadata=lora.adapter_metadata(4)
    )
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder)
    pipeline.load_lora_weights(tmp_path)
    base.network = pipeline.unet.eval()
    torch.testing.assert_close(_forward(base), student, atol=1e-5, rtol=1e-4)


def test_the_same_adapter_gives_the_same_bytes(base: LoadedBase, tmp_path: Path):
    _trained(base)
    files = set()
    for number in range(8):  # safetensors writes the header's metadata in a random order: two files often agree
        path = tmp_path / str(number)
        lora.save_file(lora.state_dict(base.network), path, dtype=torch.float16, metadata=lora.adapter_metadata(4))
        files.add(path.read_bytes())
    assert len(files) == 1
    assert len(load_file(path)) == 2 * lora.adapted_layers(base.network)


def test_an_adapter_of_another_base_and_a_broken_file_are_refused_by_name(base: LoadedBase, tmp_path: Path):
    path = tmp_path / "other.safetensors"
    save_plain({"unet.elsewhere.lora_A.weight": torch.zeros(4, 8)}, path)
    with pytest.raises(UserError, match="elsewhere, which this base does not have"):
        lora.load(base.network, path)
    path.write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"other\.safetensors: is not a readable"):
        lora.load(base.network, path)


def test_layers_of_different_ranks_are_attached_at_scale_1(base: LoadedBase):
    _trained(base, alpha=4)
    student = _forward(base)
    layers = {n: (m.lora_A["lcm"].weight, m.lora_B["lcm"].weight) for n, m in lora._layers(base.network)}
    name = next(n for n in layers if n.endswith("attn1.to_q"))
    halves = [(down[:2], up[:, :2]) if n == name else (down, up) for n, (down, up) in layers.items()]
    rest = [(down[2:], up[:, 2:]) for n, (down, up) in layers.items() if n == name]
    bare = UNet2DConditionModel.from_pretrained(base.folder, subfolder="unet").eval()
    lora.attach(bare, dict(zip(layers, halves, strict=True)), "two ranks")
    assert {p.shape[0] for n, p in bare.named_parameters() if "lora_A" in n} == {2, 4}
    module = bare.get_submodule(name)
    module.base_layer.weight.data += rest[0][1] @ rest[0][0]
    base.network = bare
    torch.testing.assert_close(_forward(base), student, atol=1e-5, rtol=1e-4)


def test_a_layer_of_another_size_and_a_lost_tensor_are_refused_by_name(base: LoadedBase, tmp_path: Path):
    _trained(base)
    tensors = lora.state_dict(base.network)
    base.network = UNet2DConditionModel.from_pretrained(base.folder, subfolder="unet")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    save_plain(tensors | {f"unet.{name}.lora_A.weight": torch.zeros(4, 99)}, tmp_path / "a")
    with pytest.raises(UserError, match=rf"{name} is \(4, 99\) and \(16, 4\), and this base's weight is \(16, 16\)"):
        lora.load(base.network, tmp_path / "a")
    del tensors[f"unet.{name}.lora_B.weight"]
    save_plain(tensors, tmp_path / "a")
    with pytest.raises(UserError, match=rf"{name}\.lora_B\.weight is missing"):
        lora.load(base.network, tmp_path / "a")
    save_plain({f"unet.{name}.lora_B.weight": torch.zeros(16, 4)}, tmp_path / "a")
    with pytest.raises(UserError, match=rf"1 tensors do not fit this base, the first is {name}\.lora_B\.weight"):
        lora.load(base.network, tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_applied_adapter_draws_as_the_student_and_its_undoing_restores_the_base_to_the_bit(
    base: LoadedBase, dtype: torch.dtype
):
    _trained(base, alpha=8)
    layers = {
        n: (m.lora_A["lcm"].weight.detach(), m.lora_B["lcm"].weight.detach() * m.scaling["lcm"])
        for n, m in lora._layers(base.network)
    }
    base.network.to(dtype)
    base.dtype = dtype
    student = _forward(base)
    bare = UNet2DConditionModel.from_pretrained(base.folder, subfolder="unet", torch_dtype=dtype).eval()
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    base.network = bare
    alone = _forward(base)
    for _ in range(2):  # one adapter after the other
        with lora.applied(bare, layers, "adapter"):
            drawn = _forward(base)
    # Half precision rounds where the sums are taken, which differs from layer to layer.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03 * student.abs().max().item()
    torch.testing.assert_close(drawn, student, atol=tolerance, rtol=1e-4)
    assert (drawn - alone).abs().max() > 3 * tolerance
    after = bare.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
