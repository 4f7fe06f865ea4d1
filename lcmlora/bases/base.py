"""A base in memory: its parts, and one interface to them for bases of all families.

Family, schedule, prediction type and VAE scaling are read from the base's own folder and never configured. Everything
in which families differ is in `families`.
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

from lcmlora.bases.examination.examine import Examination, examine_base, family_of
from lcmlora.bases.examination.library_config import LibraryConfig
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
    scheduler_config: LibraryConfig
    vae_config: LibraryConfig
    examination: Examination
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
        """The number of pixels that the sides of a picture must be multiples of."""
        return self.family.size_unit(self.folder)

    @property
    def latent_scale(self) -> float:
        """The factor of the VAE's latents that makes them diffusion-ready."""
        return self.family.latent_scale(self.vae_config)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the diffusion-ready latent, both (B, C, h, w) fp32.

        The VAE's scaling factor is applied: a sample of the latent is mean + exp(logvar / 2) * noise.
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
        """The maximal number of tokens of a caption, for each text encoder."""
        return [tokenizer.model_max_length for tokenizer in self.tokenizers]

    def count_truncated(self, captions: list[str]) -> int:
        """Returns the number of captions that are longer than a text encoder reads."""
        lengths = [
            [len(ids) > tokenizer.model_max_length for ids in tokenizer(captions, verbose=False).input_ids]
            for tokenizer in self.tokenizers
        ]
        return sum(map(any, zip(*lengths, strict=True)))

    @torch.no_grad()
    def encode_tokens(self, token_ids: list[Tensor]) -> Conditioning:
        """Token ids (B, T) for each text encoder -> conditioning without `micro_conditioning`, fp32."""
        return self.family.encode_tokens(self.text_encoders, token_ids)

    def encode_text(self, captions: list[str]) -> Conditioning:
        """Captions -> conditioning of len(captions) rows without `micro_conditioning`, fp32 on the base's device."""
        return self.encode_tokens(self.tokenize(captions))

    def unconditional(self) -> Conditioning:
        """Returns the unconditional embedding as one row: the empty prompt's, or zeros if the base was trained so."""
        empty = self.encode_text([""])
        if self.empty_is_zeros:
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty

    def micro_conditioning(
        self, sizes: Tensor | None = None, crops: Tensor | None = None, *, rows: int = 1
    ) -> Conditioning:
        """Returns the conditioning on sizes and crops of pictures of the base's resolution, on the base's device.

        Args:
            sizes: (B, 2) of the original pictures, height before width, in pixels; the base's resolution by default.
            crops: (B, 2) of the crops' corners, top before left, in pixels; uncropped by default.
            rows: B.
        """
        target = torch.full((rows, 2), float(self.resolution))
        sizes = target if sizes is None else sizes.float().cpu()
        crops = torch.zeros(rows, 2) if crops is None else crops.float().cpu()
        conditioning = self.family.micro_conditioning(sizes, crops, target)
        return {name: value.to(self.device) for name, value in conditioning.items()}

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's raw output (B, C, h, w) fp32; see `Schedule.prediction`.

        Args:
            latents: (B, C, h, w) fp32.
            timesteps: (B,) in [0, T): int64, or fp32 where a solver goes between two rows of the schedule.
            conditioning: a row for each latent, with `micro_conditioning`.
        """
        return self.family.forward(self.network, latents, self.schedule.network_time(timesteps), conditioning)


def pick_device(device: str) -> torch.device:
    """Returns the device of a setting: `auto` is the GPU, or the CPU on a machine without one.

    Raises:
        UserError: the setting is `cuda`, and the machine has no usable GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, and this machine has no usable GPU")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a setting: `auto` is fp32 on a CPU, bf16 on a GPU that has it, and fp16 on an older GPU."""
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
    """Loads parts of a base from its diffusers folder, frozen and in evaluation mode.

    Args:
        dtype: of the parts; the VAE is loaded in fp32 instead of fp16.
        parts: some of network, vae and text.

    Raises:
        UserError: the base has a fault (see `examine_base`), or a part cannot be loaded.
    """
    examination = examine_base(name, folder, base.variant)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    index = LibraryConfig.read(folder / "model_index.json")
    family = family_of(index)
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
        vae_config=LibraryConfig.read(folder / family.vae.folder / "config.json"),
        examination=examination,
        empty_is_zeros=family.empty_is_zeros(index),
    )

    def load_part(part: Part) -> Any:
        try:
            with bars.hidden():
                module = family.load(part, folder, base.variant, dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder / part.folder}: cannot be loaded: {' '.join(str(error).split())}") from error
        return module.to(device).eval().requires_grad_(False)

    if "network" in parts:
        loaded.network = load_part(family.network)
        family.prepare(loaded.network)
    if "vae" in parts:
        loaded.vae = load_part(family.vae)
    if "text" in parts:
        loaded.tokenizers = [family.load_tokenizer(part, folder) for part in family.tokenizers]
        loaded.text_encoders = [load_part(part) for part in family.text_encoders]
    return loaded


def save_base(base: LoadedBase, folder: Path) -> None:
    """Writes a base into an empty folder: its network as it is in memory, everything else as in its own folder."""
    for path in sorted(base.folder.iterdir()):
        if path.name.startswith("."):  # markers of where the base came from
            continue
        if path.name == base.family.network.folder:
            # In the variant that the base's own file has.
            base.network.save_pretrained(folder / path.name, safe_serialization=True, variant=variant(base.folder))
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
