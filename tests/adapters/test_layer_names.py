import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lcmlora.adapters import layer_names, lora
from lcmlora.bases import architecture
from lcmlora.errors import UserError
from tests.support import original
from tests.support.miniature import ARCHITECTURES, HUB_IDS, PUBLISHED, RESOLUTION

# From tables of others: make_unet_conversion_map of kohya-ss/sd-scripts, library/sdxl_model_util.py, and
# unet_to_diffusers of comfyanonymous/ComfyUI, comfy/utils.py.
SDXL_NAMES = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.resnets.1.conv2": "input_blocks_2_0_out_layers_3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": "middle_block_1_transformer_blocks_0_attn1_to_out_0",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_v": "output_blocks_0_1_transformer_blocks_9_attn2_to_v",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2": "output_blocks_5_1_transformer_blocks_1_ff_net_2",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
}


def _published(name: str) -> layer_names.Architecture:
    return layer_names.published()[HUB_IDS[name]]


def _adapted(name: str) -> list[str]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[HUB_IDS[name]])
        lora.inject(unet, rank=64, alpha=64, seed=0)
    return [layer for layer, _ in lora._layers(unet)]


def test_sdxls_layers_have_the_names_that_kohya_and_comfyui_give_them():
    names = _published("sdxl").kohya
    assert {layer: names[layer] for layer in SDXL_NAMES} == SDXL_NAMES


def test_ssd_1bs_depths_leave_its_names_as_sdxl_has_them():
    small, large = _published("ssd1b"), _published("sdxl")
    assert small.kohya.items() < large.kohya.items()
    assert "middle_block_0_in_layers_2" in small.kohya.values()
    assert not any(name.startswith("middle_block_1") for name in small.kohya.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_has_its_name_in_a_checkpoint_of_the_original_code(name: str):
    base = _published(name)
    expected = original._unet({f"{layer}.weight": layer for layer in base.shapes})  # type: ignore[misc]
    plain = {layer: layer.replace(".", "_") for layer in base.shapes}
    sgm = {layer: place.removesuffix(".weight").replace(".", "_") for place, layer in expected.items()}
    assert base.spellings == {spelled: layer for names in (plain, sgm) for layer, spelled in names.items()}
    assert base.kohya == (sgm if name in ("sdxl", "ssd1b") else plain)
    assert len(set(base.kohya.values())) == len(base.shapes)


@pytest.mark.parametrize(("name", "layers"), [("sd15", 278), ("sd2", 278), ("ssd1b", 423), ("sdxl", 788)])
def test_every_layer_that_is_distilled_has_a_name_for_kohya(name: str, layers: int):
    base = _published(name)
    names = {base.kohya[layer] for layer in _adapted(name)}
    assert len(names) == layers


@pytest.mark.parametrize(
    ("name", "family", "prediction"),
    [
        ("sd15", "sd1", "epsilon"),
        ("sd2", "sd2", "v_prediction"),
        ("sdxl", "sdxl", "epsilon"),
        ("ssd1b", "ssd1b", "epsilon"),
    ],
)
def test_a_bases_folder_gives_its_architecture_without_weights(
    miniatures: Callable[[str], Path], tmp_path: Path, name: str, family: str, prediction: str
):
    folder = shutil.copytree(miniatures(name), tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    base = architecture.of_folder(folder)
    assert (base.naming.name, base.resolution, base.prediction_type) == (family, RESOLUTION, prediction)
    assert base.kohya.keys() <= _published(name).shapes.keys()


def test_a_folder_that_is_no_base_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match=r"unet/config.json: no such file; expected the folder of a diffusers base"):
        architecture.of_folder(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"block_out_channels": [8]}')
    with pytest.raises(UserError, match=r"unet/config.json: diffusers cannot build a UNet"):
        architecture.of_folder(tmp_path)
