"""Adapters of the miniature bases, as if they had been trained, and one forward to compare them by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.adapters.formats import Adapter, Layer
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Base
from tests.support.miniature import RESOLUTION


def load(folder: Path, *parts: str) -> LoadedBase:
    """Returns the base in `folder` on the CPU, bare; its network alone by default."""
    settings = Base(source=str(folder), resolution=RESOLUTION, license="mit")
    return bases.load(folder.name, settings, folder, device=torch.device("cpu"), parts=parts or ("network",))


def train(base: LoadedBase, *, rank: int = 4, alpha: float = 8, seed: int = 0, targets: str = "") -> None:
    """Gives the base's UNet an adapter with weights; those of modules whose name has no `targets` in it are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora.inject(base.network, rank=rank, alpha=alpha, seed=seed).items():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) * (targets in name)


def adapter_of(base: LoadedBase, source: str = "student", targets: str = "") -> Adapter:
    """Returns the adapter in the base's UNet with its own alpha; without modules whose name has no `targets` in it."""
    layers = {}
    for name, layer in lora._layers(base.network):
        if targets in name:
            down, up = (part[lora.ADAPTER].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
            layers[name] = Layer(down, up, layer.scaling[lora.ADAPTER] * down.shape[0])
    return Adapter(source, dict(sorted(layers.items())), torch.float32)


@torch.no_grad()
def forward(base: LoadedBase, unet: Any = None) -> Tensor:
    """Returns the output (2, 4, 8, 8) of the base's UNet, or of another one in its place, for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    unet = unet or base.network
    width = unet.config.cross_attention_dim
    conditioning = {"encoder_hidden_states": torch.randn(2, 5, width, generator=generator)}
    if micro := base.micro_conditioning(rows=2):
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        conditioning["text_embeds"] = torch.randn(2, pooled, generator=generator)
        conditioning |= micro
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return base.family.forward(unet, latents, torch.tensor([999, 259]), conditioning)


def pipeline(folder: Path) -> DiffusionPipeline:
    """Returns the base as any user of diffusers would load it."""
    options = {} if (folder / "text_encoder_2").is_dir() else {"safety_checker": None}
    return DiffusionPipeline.from_pretrained(folder, **options)


def loaded_layers(unet: Any) -> int:
    """Returns how many layers diffusers has given an adapter."""
    return sum(".lora_A." in name for name, _ in unet.named_parameters())


def header(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + size])["__metadata__"])
