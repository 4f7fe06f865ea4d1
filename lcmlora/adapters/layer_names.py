"""A UNet's layers by its configuration alone: the shapes of their weights, and their names in adapters' files.

diffusers' files name a layer as its module. Kohya's files write underscores for dots and, for the SDXL family, the
names of the original code (input_blocks, middle_block, output_blocks), since kohya's trainer runs SDXL on that code and
other bases on diffusers' (kohya-ss/sd-scripts, networks/lora.py and library/sdxl_model_util.py). ComfyUI reads both
spellings for every base (comfy/utils.py, unet_to_diffusers); A1111 counts diffusers' blocks as SD 1 and 2 have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import TYPE_CHECKING

from lcmlora.io.parsing import JsonObject

if TYPE_CHECKING:
    from torch import nn

_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class Naming:
    """The names of a kind of base in kohya's trainer and the Stability model spec.

    Source: library/train_util.py and library/sai_model_spec.py of kohya-ss/sd-scripts.
    """

    name: str
    version: str  # ss_base_model_version
    architecture: str  # modelspec.architecture
    v2: bool = False  # ss_v2
    original: bool = False  # layers have the names of the original code, not diffusers'
    predicting_v: tuple[str, str] | None = None  # version and architecture of a base that predicts v, if they differ


SD1 = Naming("sd1", "sd_v1", "stable-diffusion-v1")
SD2 = Naming(
    "sd2",
    "sd_v2",
    "stable-diffusion-v2-512",
    v2=True,
    predicting_v=("sd_v2_v", "stable-diffusion-v2-768-v"),
)
SDXL = Naming("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", original=True)
# kohya's trainer has no version of its own for SSD-1B, and programs that read one treat its adapters as SDXL's. The
# architecture is SwarmUI's name for it (src/Text2Image/T2IModelClassSorter.cs).
SSD1B = Naming("ssd1b", "sdxl_base_v1-0", "segmind-stable-diffusion-1b", original=True)


@dataclass(frozen=True)
class Architecture:
    """The layers of a UNet that an adapter may change: its linear ones and its convolutions."""

    naming: Naming
    shapes: dict[str, tuple[int, ...]]  # of the weights, (out, in) or (out, in, kh, kw), by diffusers' name
    prefix: str = "unet"  # of the layers' names in diffusers' files: the network's folder in the base's
    resolution: int | None = None  # the pictures' side, in pixels
    prediction_type: str | None = None  # as the base's scheduler has it

    @cached_property
    def kohya(self) -> dict[str, str]:
        """The layers' names in kohya's files, without `lora_unet_`, by diffusers' name."""
        names = _original(self.shapes) if self.naming.original else {name: name for name in self.shapes}
        return {name: other.replace(".", "_") for name, other in names.items()}

    @cached_property
    def spellings(self) -> dict[str, str]:
        """diffusers' name of a layer by each of its spellings in kohya's files.

        With underscores for dots these are diffusers' names, as in the published LCM-LoRA for SDXL, and the original
        code's.
        """
        plain = {name.replace(".", "_"): name for name in self.shapes}
        return plain | {other.replace(".", "_"): name for name, other in _original(self.shapes).items()}


def of_network(
    network: nn.Module,
    *,
    naming: Naming,
    prefix: str = "unet",
    resolution: int | None = None,
    prediction_type: str | None = None,
) -> Architecture:
    """Returns the architecture of a network, which may be on torch's meta device."""
    from torch import nn

    shapes = {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return Architecture(naming, shapes, prefix, resolution, prediction_type)


def naming_of_unet(config: Mapping[str, object]) -> Naming:
    """Returns the naming of a UNet with this configuration."""
    if config.get("addition_embed_type") == "text_time":
        return SSD1B if _is_ssd1b(config) else SDXL
    return SD2 if config.get("use_linear_projection") else SD1


def _is_ssd1b(config: Mapping[str, object]) -> bool:
    """Whether an SDXL UNet was distilled as SSD-1B was: no attention in the middle, depths that differ in a block."""
    depths = config.get("reverse_transformer_layers_per_block")
    uneven = isinstance(depths, list | tuple) and any(isinstance(d, list | tuple) and len(set(d)) > 1 for d in depths)
    return uneven and config.get("mid_block_type") == "UNetMidBlock2D"


@cache
def published_configs() -> dict[str, JsonObject]:
    """Returns the configurations of the published bases' UNets, by hub id, without diffusers' defaults."""
    text = resources.files("lcmlora").joinpath("architectures.json").read_text(encoding="utf-8")
    configs: dict[str, JsonObject] = json.loads(text)
    return configs


@cache
def published() -> dict[str, Architecture]:
    """Returns the architectures of the published bases' UNets, by hub id."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return {
            name: of_network(
                UNet2DConditionModel.from_config(config),
                naming=naming_of_unet(config),
                resolution=8 * config["sample_size"],
            )
            for name, config in published_configs().items()
        }


def _original(names: Iterable[str]) -> dict[str, str]:
    """Returns the layers' names in the original code (openaimodel.UNetModel), by diffusers' names.

    The original code has one list of blocks for each side: conv_in, then a block for every resnet (with the attention
    after it), and one for every downsampler; an upsampler is the last part of the block before it. Depths differ from
    base to base, so the blocks are counted from the names.
    """
    names = list(names)
    places: dict[tuple[str, ...], str] = {}
    for side, blocks, place in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for block in _numbers(names, rf"{side}_blocks\.(\d+)\."):
            inside = [name for name in names if name.startswith(f"{side}_blocks.{block}.")]
            for layer in _numbers(inside, r".*\.resnets\.(\d+)\."):
                places[side, block, "resnets", layer] = f"{blocks}.{place}.0"
                places[side, block, "attentions", layer] = f"{blocks}.{place}.1"
                place += 1
            if side == "down" and _numbers(inside, r".*\.downsamplers\.(\d+)\."):
                places[side, block, "downsamplers", "0"] = f"{blocks}.{place}.0"
                place += 1
            attends = bool(_numbers(inside, r".*\.attentions\.(\d+)\."))
            places[side, block, "upsamplers", "0"] = f"{blocks}.{place - 1}.{1 + attends}"
    original = {name: _OUTSIDE[name] for name in names if name in _OUTSIDE}
    for name in names:
        if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
            *place_of, rest = match.groups()
            original[name] = f"{places[tuple(place_of)]}.{_part(match[3], rest)}"
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            middle = 1 if match[1] == "attentions" else 2 * int(match[2])
            original[name] = f"middle_block.{middle}.{_part(match[1], match[3])}"
    return original


def _part(kind: str, name: str) -> str:
    if kind == "resnets":
        return _RESNET.get(name, name)
    return "op" if kind == "downsamplers" else name


def _numbers(names: Iterable[str], pattern: str) -> list[str]:
    """Returns the different numbers that the pattern's group matches at the start of names, ascending."""
    numbers = {match[1] for name in names if (match := re.match(pattern, name))}
    return sorted(numbers, key=int)
