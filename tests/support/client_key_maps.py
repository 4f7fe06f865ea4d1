"""Which layer of a UNet each program gives a tensor of an adapter's file to, by the program's own rules.

Written out anew from the programs' code, with version and source named, and without lcmlora's: the tests compare the
two. Names of layers are those of the original code (input_blocks, middle_block, output_blocks), but for InvokeAI, which
runs diffusers' networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = (
    *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)


@dataclass(frozen=True)
class Depths:
    """The transformer layers of a UNet, as ComfyUI's `unet_config` has them (comfy/supported_models.py).

    down: for each resnet of input_blocks; up: for each of output_blocks, from the last to the first.
    middle: negative for a middle block without attention.
    """

    blocks: int
    down: tuple[int, ...]
    up: tuple[int, ...]
    middle: int


# ComfyUI, comfy/model_detection.py, unet_config_from_diffusers_unet: SD15, SDXL, SSD_1B. Each block has two resnets.
COMFYUI_DEPTHS = {
    "sd15": Depths(4, (1, 1, 1, 1, 1, 1, 0, 0), (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0), 1),
    "sdxl": Depths(3, (0, 0, 2, 2, 10, 10), (0, 0, 0, 2, 2, 2, 10, 10, 10), 10),
    "ssd1b": Depths(3, (0, 0, 2, 2, 4, 4), (0, 0, 0, 1, 1, 2, 10, 4, 4), -1),
}


def comfyui(depths: Depths) -> dict[str, str]:
    """Returns the layer by the name in a file, without `.lora_up.weight` and the like.

    ComfyUI a125cd84: comfy/lora.py, model_lora_keys_unet; comfy/utils.py, unet_to_diffusers. The same in Forge
    dfdcbab6, packages_3rdparty/comfyui_lora_collection/lora.py.
    """
    found: dict[str, str] = {}
    for _, layer in _diffusers_names(depths):
        found[f"lora_unet_{layer.replace('.', '_')}"] = layer
        found[f"diffusion_model.{layer}"] = layer
    for name, layer in _diffusers_names(depths):
        found[f"lora_unet_{name.replace('.', '_')}"] = layer
        for prefix in ("", "unet."):
            key = prefix + name.replace(".to_", ".processor.to_")
            found[key.removesuffix(".0") if key.endswith(".to_out.0") else key] = layer
    return found


def _diffusers_names(depths: Depths) -> Iterator[tuple[str, str]]:
    """Yields diffusers' name and the original code's name of each layer that an adapter of LCM-LoRA changes."""

    def attention(name: str, layer: str, count: int) -> Iterator[tuple[str, str]]:
        for part in ("proj_in", "proj_out"):
            yield f"{name}.{part}", f"{layer}.{part}"
        for n in range(count):
            for part in _BLOCK:
                yield f"{name}.transformer_blocks.{n}.{part}", f"{layer}.transformer_blocks.{n}.{part}"

    def resnet(name: str, layer: str) -> Iterator[tuple[str, str]]:
        for theirs, diffusers in _RESNET.items():
            yield f"{name}.{diffusers}", f"{layer}.{theirs}"

    down, up = list(depths.down), list(depths.up)
    for block in range(depths.blocks):
        place = 1 + 3 * block
        for n in range(2):
            yield from resnet(f"down_blocks.{block}.resnets.{n}", f"input_blocks.{place}.0")
            if count := down.pop(0):
                yield from attention(f"down_blocks.{block}.attentions.{n}", f"input_blocks.{place}.1", count)
            place += 1
        yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
    if depths.middle > 0:
        yield from attention("mid_block.attentions.0", "middle_block.1", depths.middle)
    for n, place in enumerate((0, 2)):
        yield from resnet(f"mid_block.resnets.{n}", f"middle_block.{place}")
    for block in range(depths.blocks):
        for n in range(3):
            place = 3 * block + n
            yield from resnet(f"up_blocks.{block}.resnets.{n}", f"output_blocks.{place}.0")
            if count := up.pop():
                yield from attention(f"up_blocks.{block}.attentions.{n}", f"output_blocks.{place}.1", count)
            if n == 2:
                yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{place}.{1 + bool(count)}.conv"


def comfyui_layers(names: Iterable[str], depths: Depths) -> tuple[set[str], set[str]]:
    """Returns the layers to which ComfyUI adds the tensors of these names, and the names that it does not load.

    ComfyUI a125cd84: comfy/weight_adapter/lora.py, LoRAAdapter.load. Its names of the factor B.
    """
    names = set(names)
    layers: set[str] = set()
    loaded: set[str] = set()
    for key, layer in comfyui(depths).items():
        for up, down in (
            (f"{key}.lora_up.weight", f"{key}.lora_down.weight"),
            (f"{key}_lora.up.weight", f"{key}_lora.down.weight"),
            (f"{key}.lora_B.weight", f"{key}.lora_A.weight"),
            (f"{key}.lora_linear_layer.up.weight", f"{key}.lora_linear_layer.down.weight"),
        ):
            if up in names:
                layers.add(layer)
                loaded |= {up, down, f"{key}.alpha"} & names
    return layers, names - loaded


def invokeai_base(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the base of which InvokeAI takes a file for an adapter; None where it takes it for no adapter.

    InvokeAI 8e71a8a: invokeai/backend/model_manager/configs/lora.py, LoRA_LyCORIS_Config_Base, and
    invokeai/backend/model_manager/util/model_util.py, lora_token_vector_length.
    """
    starts, ends = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_"), ("lora_A.weight", "lora_B.weight")
    if not any(name.startswith(starts) or name.endswith(ends) for name in tensors):
        return None
    for name, tensor in tensors.items():
        _, _, part = name.partition(".")
        of_text = name.startswith("lora_unet_") and ("_attn2_to_k." in name or "_attn2_to_v." in name)
        of_time = name.startswith("lora_unet_") and "time_emb_proj.lora_down" in name
        if (of_text or of_time) and part == "lora_down.weight":
            return {768: "sd-1", 1024: "sd-2", 1280: "sdxl", 2048: "sdxl"}.get(tensor.shape[1])
    return None


def invokeai_names(names: Iterable[str]) -> set[str]:
    """Returns diffusers' names, with underscores for dots, of the layers that an SDXL file's tensors are for.

    InvokeAI 8e71a8a: invokeai/backend/patches/lora_conversions/sdxl_lora_conversion_utils.py.

    Raises:
        ValueError: some names are of the original code and some are not.
    """
    table: dict[str, str] = {}
    for block in range(3):
        for n in range(2):
            place = 3 * block + n + 1
            table |= _invokeai_resnet(f"input_blocks_{place}_0", f"down_blocks_{block}_resnets_{n}")
            table[f"input_blocks_{place}_1"] = f"down_blocks_{block}_attentions_{n}"
        for n in range(3):
            place = 3 * block + n
            table |= _invokeai_resnet(f"output_blocks_{place}_0", f"up_blocks_{block}_resnets_{n}")
            table[f"output_blocks_{place}_1"] = f"up_blocks_{block}_attentions_{n}"
        table[f"input_blocks_{3 * (block + 1)}_0_op"] = f"down_blocks_{block}_downsamplers_0_conv"
        table[f"output_blocks_{3 * block + 2}_2"] = f"up_blocks_{block}_upsamplers_0"
    table["middle_block_1"] = "mid_block_attentions_0"
    for n in range(2):
        table |= _invokeai_resnet(f"middle_block_{2 * n}", f"mid_block_resnets_{n}")
    layers: set[str] = set()
    known: list[bool] = []
    for layer in {name.partition(".")[0].removeprefix("lora_unet_") for name in names}:
        start = max((key for key in table if layer.startswith(key)), key=len, default=None)
        known.append(start is not None)
        layers.add(layer if start is None else table[start] + layer.removeprefix(start))
    if len(set(known)) > 1:
        raise ValueError("The SDXL LoRA could only be partially converted to diffusers format.")
    return layers


def _invokeai_resnet(theirs: str, diffusers: str) -> dict[str, str]:
    return {f"{theirs}_{part.replace('.', '_')}": f"{diffusers}_{name}" for part, name in _RESNET.items()}
