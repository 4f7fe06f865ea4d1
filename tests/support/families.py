"""A family of bases as another package would add it: a diffusion transformer trained by flow matching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from torch import Tensor

from lcmlora.adapters.layer_names import Naming
from lcmlora.adapters.lora import Placement
from lcmlora.bases.examination.library_config import DigestInput, LibraryConfig
from lcmlora.bases.examination.weightfiles import DIFFUSERS
from lcmlora.bases.families.family import Conditioning, Part, network_dtype
from lcmlora.bases.families.stable_diffusion import StableDiffusion
from lcmlora.bases.schedule import PredictionType, Schedule

# x_s = (1 - s) x0 + s eps, and the network gives eps - x0.
FLOW = PredictionType(
    x0=lambda output, x, alpha, sigma: x - sigma * output,
    noise=lambda output, x, alpha, sigma: x + alpha * output,
    target=lambda x0, noise, alpha, sigma: noise - x0,
)


class FlowTransformer(StableDiffusion):
    """A transformer in the UNet's place; VAE, tokenizer and text encoder are Stable Diffusion's."""

    name = "flow-transformer"
    title = "the flow transformer"
    pipeline = "TransformerPipeline"
    network = Part("transformer", ("PixArtTransformer2DModel",), DIFFUSERS)
    placement = Placement(r"transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.2)", "transformer")
    single_file = None

    def recognises(self, config: LibraryConfig) -> bool:
        return config.get("_class_name") == "PixArtTransformer2DModel"

    def naming(self, config: LibraryConfig) -> Naming:
        return Naming("flow-transformer", "flow-transformer", "flow-transformer")

    def drawing_options(self, index: LibraryConfig) -> DigestInput:
        return {"family": self.name}

    def check(self, folder: Path) -> None:
        self.check_network(LibraryConfig.read(folder / "transformer" / "config.json"))

    def check_network(self, config: LibraryConfig) -> None:
        assert config["_class_name"] == "PixArtTransformer2DModel", config.place

    def examine_schedule(self, folder: Path) -> DigestInput:
        return {"shift": LibraryConfig.read(folder / "scheduler" / "scheduler_config.json")["shift"]}

    def size_unit(self, folder: Path) -> int:
        return 4

    def prepare(self, network: Any) -> None:
        """Its attention is left as it is."""

    def schedule(self, folder: Path, resolution: int) -> tuple[Schedule, LibraryConfig]:
        config = LibraryConfig.read(folder / "scheduler" / "scheduler_config.json")
        shift = config.number("shift", 1.0)
        p = torch.arange(1, 1001) / 1000
        sigma = shift * p / (1 + (shift - 1) * p)
        return Schedule(1 - sigma, sigma, 1000 * sigma, "flow"), config

    def forward(self, network: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = network_dtype(network)
        text = conditioning["encoder_hidden_states"].to(dtype)
        sizes = {"resolution": None, "aspect_ratio": None}
        return network(latents.to(dtype), text, timestep=time, added_cond_kwargs=sizes, return_dict=False)[0].float()


def save_flow_transformer(folder: Path, like: Path) -> Path:
    """Writes a miniature of it with the text encoder and the VAE of the base at `like`."""
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    network.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = json.loads((like / "model_index.json").read_text())
    for part in ("vae", "tokenizer", "text_encoder"):
        (folder / part).symlink_to(like / part)
    index = {part: index[part] for part in ("vae", "tokenizer", "text_encoder")}
    index |= {"_class_name": "TransformerPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
