"""A base in memory: its parts, and what all of the package asks of them, whatever kind of base it is.

What can be read from the base's own folder (kind, schedule, prediction type, VAE scaling) is read there and never
configured. What differs between kinds stands in `families`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmlora.bases.examination import examine
from lcmlora.bases.examination.examine import Examination
from lcmlora.bases.examination.weightfiles import json_of
from lcmlora.bases.families.family import Conditioning, Family, Part
from lcmlora.bases.folders import variant
from lcmlora.bases.schedule import Schedule
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.patches import bars


@dataclass
class LoadedBase:
    """A base in memory, frozen and in evaluation mode. Made by `load`."""

    name: str
    folder: Path
    family: Family
    resolution: int
    device: torch.device
    dtype: torch.dtype
    schedule: Schedule  # on `device`
    scheduler_config: dict[str, Any]  # as diffusers has it
    vae_config: dict[str, Any]
    examined: Examination  # with the digests that name it
    empty_is_zeros: bool  # the unconditional embedding is zeros, not that of the empty prompt
    network: Any = None
    vae: Any = None
    tokenizers: list[Any] = field(default_factory=list)
    text_encoders: list[Any] = field(default_factory=list)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of `resolution` pixels."""
        side = self.resolution // self.family.latent_factor(self.vae_config)
        return (self.family.latent_channels(self.vae_config), side, side)

    @property
    def size_unit(self) -> int:
        """What the sides of a picture must be multiples of, in pixels."""
        return self.family.size_unit(self.folder)

    @property
    def latent_scale(self) -> float:
        return self.family.latent_scale(self.vae_config)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the diffusion-ready latent, both (B, C, h, w) fp32.

        The VAE's scaling factor is applied, so a sample is mean + exp(logvar / 2) * noise and nothing else.
        """
        return self.family.encode_pictures(self.vae, pictures)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Diffusion-ready latents (B, C, h, w) -> pictures (B, 3, H, W) fp32 in [0, 1]."""
        return self.family.decode(self.vae, latents)

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        """Returns one tensor of token ids (B, T) int64 for each text encoder, padded and truncated to its length."""
        return self.family.tokenize(self.tokenizers, captions)

    @property
    def token_lengths(self) -> list[int]:
        """How many tokens each text encoder reads."""
        return [tokenizer.model_max_length for tokenizer in self.tokenizers]

    def cut(self, captions: list[str]) -> int:
        """Returns how many of the captions a text encoder does not read to their end."""
        lengths = [
            [len(ids) > tokenizer.model_max_length for ids in tokenizer(captions, verbose=False).input_ids]
            for tokenizer in self.tokenizers
        ]
        return sum(map(any, zip(*lengths, strict=True)))

    @torch.no_grad()
    def encode_tokens(self, token_ids: list[Tensor]) -> Conditioning:
        """Token ids of each encoder, (B, T) -> conditioning without the pictures' own; fp32."""
        return self.family.encode_tokens(self.text_encoders, token_ids)

    def encode_text(self, captions: list[str]) -> Conditioning:
        """Captions -> conditioning of len(captions) rows, without the pictures' own; fp32 on the base's device."""
        return self.encode_tokens(self.tokenize(captions))

    def unconditional(self) -> Conditioning:
        """The unconditional embedding as one row: the empty prompt, or zeros where the base was trained so."""
        empty = self.encode_text([""])
        if self.empty_is_zeros:
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty

    def micro_conditioning(
        self, sizes: Tensor | None = None, crops: Tensor | None = None, *, rows: int = 1
    ) -> Conditioning:
        """What the network is told of pictures of the base's resolution besides their captions; see `Family`.

        Without arguments: an uncropped picture, as for sampling.
        """
        target = torch.full((rows, 2), float(self.resolution))
        sizes = target if sizes is None else sizes.float().cpu()
        crops = torch.zeros(rows, 2) if crops is None else crops.float().cpu()
        told = self.family.micro_conditioning(sizes, crops, target)
        return {name: value.to(self.device) for name, value in told.items()}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the network as it stands: its raw output (B, C, h, w) fp32; see `Schedule.prediction`.

        Args:
            latents: (B, C, h, w) fp32.
            timesteps: (B,) in [0, T): int64, or fp32 where a solver goes between two rows of the schedule.
            conditioning: rows for each latent, with `micro_conditioning`.
        """
        return self.family.forward(self.network, latents, self.schedule.network_time(timesteps), conditioning)


def pick_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError where `cuda` is asked for and missing."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for and this machine has no usable GPU")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is fp32 on a CPU, bf16 on a GPU that has it, and fp16 on an older one."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        precision = "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load(
    name: str,
    base: Base,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    parts: Sequence[str] = ("network", "vae", "text"),
) -> LoadedBase:
    """Loads the named parts of a diffusers folder, frozen, in evaluation mode and in `dtype` (the VAE never in fp16).

    Raises:
        UserError: the base has a fault (see `examine.examine`), or a part cannot be read.
    """
    examined = examine.examine(name, folder, base.variant)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    index = json_of(folder / "model_index.json")
    family = examine.family_of(folder, index)
    schedule, scheduler_config = family.schedule(folder, base.resolution)
    loaded = LoadedBase(
        name=name,
        folder=folder,
        family=family,
        resolution=base.resolution,
        device=device,
        dtype=dtype,
        schedule=schedule.to(device),
        scheduler_config=scheduler_config,
        vae_config=json_of(folder / family.vae.folder / "config.json"),
        examined=examined,
        empty_is_zeros=family.empty_is_zeros(index),
    )

    def part(which: Part) -> Any:
        try:
            with bars.hidden():
                module = family.load(which, folder, base.variant, dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder / which.folder}: cannot be loaded: {' '.join(str(error).split())}") from error
        return module.to(device).eval().requires_grad_(False)

    if "network" in parts:
        loaded.network = part(family.network)
        family.prepare(loaded.network)
    if "vae" in parts:
        loaded.vae = part(family.vae)
    if "text" in parts:
        loaded.tokenizers = [family.load_tokenizer(which, folder) for which in family.tokenizers]
        loaded.text_encoders = [part(which) for which in family.text_encoders]
    return loaded


def write(base: LoadedBase, folder: Path) -> None:
    """Writes a base with its network as it is now into an empty folder; everything else is copied."""
    for path in sorted(base.folder.iterdir()):
        if path.name.startswith("."):  # which tell where the base came from
            continue
        if path.name == base.family.network.folder:
            # Under the name that the base's file has: a base is loaded in one variant.
            base.network.save_pretrained(folder / path.name, safe_serialization=True, variant=variant(base.folder))
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
