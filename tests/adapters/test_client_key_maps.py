"""Every program that loads adapters finds all layers of the spelling that releases have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from lcmlora.adapters import formats, layer_names, lora
from lcmlora.adapters.formats import Adapter, Layer
from tests.support import client_key_maps as clients
from tests.support.miniature import HUB_IDS, PUBLISHED

LAYERS = {"sd15": 278, "sdxl": 788, "ssd1b": 423}


@dataclass(frozen=True)
class File:
    """The tensors of an adapter of a published base at full size, rank 1, without memory for their values."""

    name: str
    layers: list[str]  # diffusers' names
    released: dict[str, Tensor]
    trained: dict[str, Tensor]


@pytest.fixture(scope="module", params=LAYERS)
def file(request: pytest.FixtureRequest) -> File:
    base = layer_names.published()[HUB_IDS[request.param]]
    layers = {}
    for name, shape in base.shapes.items():
        if lora_changes(name):
            outputs, *inputs = shape
            ones = [1] * (len(inputs) - 1)
            layers[name] = Layer(torch.zeros(()).expand(1, *inputs), torch.zeros(()).expand(outputs, 1, *ones), 1)
    adapter = Adapter(request.param, layers, torch.float32)
    return File(
        request.param, list(layers), formats._kohya(adapter, base, None)[0], formats._diffusers(adapter, "unet")[0]
    )


def lora_changes(layer: str) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in lora.TARGETS)


def test_the_layers_are_as_many_as_the_published_adapters_have(file: File):
    assert len(file.layers) == LAYERS[file.name] == len(file.released) / 3


def test_comfyui_and_forge_find_every_layer(file: File):
    layers, left = clients.comfyui_layers(file.released, clients.COMFYUI_DEPTHS[file.name])
    assert len(layers) == LAYERS[file.name] and not left


@pytest.mark.parametrize(("name", "loaded"), [("sd15", 150), ("sdxl", 228)])
def test_of_diffusers_spelling_comfyui_drops_the_attention_as_it_did_when_it_was_run(name: str, loaded: int):
    """The figures of ComfyUI a125cd84's own code, which show that its rules are rightly written out here."""
    base = layer_names.published()[HUB_IDS[name]]
    names = [f"unet.{layer}.lora_{part}.weight" for layer in base.shapes if lora_changes(layer) for part in "AB"]
    layers, left = clients.comfyui_layers(names, clients.COMFYUI_DEPTHS[name])
    assert len(layers) == loaded and all(".attn" in each for each in left)


def test_invokeai_recognises_the_released_file_and_not_the_trained_one(file: File):
    assert clients.invokeai_base(file.released) == {"sd15": "sd-1", "sdxl": "sdxl", "ssd1b": "sdxl"}[file.name]
    assert clients.invokeai_base(file.trained) is None


def test_invokeai_finds_every_layer(file: File):
    plain = {layer.replace(".", "_") for layer in file.layers}
    if file.name == "sd15":  # there it takes the names as they are
        assert {name.partition(".")[0].removeprefix("lora_unet_") for name in file.released} == plain
    else:
        assert clients.invokeai_names(file.released) == plain


def test_diffusers_finds_every_layer_with_its_alpha(file: File):
    pipeline = StableDiffusionPipeline if file.name == "sd15" else StableDiffusionXLPipeline
    with torch.device("meta"):
        config = UNet2DConditionModel.from_config(PUBLISHED[HUB_IDS[file.name]]).config
    tensors, alphas = pipeline.lora_state_dict(dict(file.released), unet_config=config)
    assert len(alphas) == LAYERS[file.name]
    unet = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
    expected = {f"{layer}.lora_{part}.weight" for layer in file.layers for part in "AB"}
    assert convert_unet_state_dict_to_peft(unet).keys() == expected
