"""All that differs between base models: loading, text conditioning, micro-conditioning, latents, prediction type.

The rest of the package sees one interface. What can be read from the base's own folder (architecture, schedule,
prediction type, VAE scaling) is read there and never configured.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmlora.bases.examination import examine
from lcmlora.bases.examination.examine import Examination
from lcmlora.bases.examination.weightfiles import json_of
from lcmlora.bases.folders import variant
from lcmlora.bases.schedule import Schedule
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.patches.attention import DirectAttention, WideAttention
from lcmlora.patches.lora_forwards import refresh

# What a UNet is given besides latents and timestep: `encoder_hidden_states` (B, T, C) and, for the SDXL family,
# `text_embeds` (B, P) and `time_ids` (B, 6).
Conditioning = dict[str, Tensor]


@dataclass
class LoadedBase:
    """A base in memory, frozen and in evaluation mode. Made by `load`."""

    name: str
    folder: Path
    kind: str  # "sd" or "sdxl" (two text encoders, micro-conditioning)
    resolution: int
    device: torch.device
    dtype: torch.dtype
    schedule: Schedule  # on `device`
    scheduler_config: dict[str, Any]  # as diffusers has it
    vae_config: dict[str, Any]
    examined: Examination  # with the digests that name it
    empty_is_zeros: bool  # the unconditional embedding is zeros, not that of the empty prompt (SDXL)
    unet: Any = None
    vae: Any = None
    tokenizers: list[Any] = field(default_factory=list)
    text_encoders: list[Any] = field(default_factory=list)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of `resolution` pixels."""
        side = self.resolution // 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        return (self.vae_config["latent_channels"], side, side)

    @property
    def size_unit(self) -> int:
        """What the sides of a picture must be multiples of, in pixels: the VAE and the UNet halve them so often."""
        unet = json_of(self.folder / "unet" / "config.json")["block_out_channels"]
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1 + len(unet) - 1))

    @property
    def latent_scale(self) -> float:
        return float(self.vae_config.get("scaling_factor", 0.18215))

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the diffusion-ready latent, both (B, C, h, w) fp32.

        The VAE's scaling factor is applied, so a sample is mean + exp(logvar / 2) * noise and nothing else.
        """
        posterior = self.vae.encode(pictures.to(self.vae.device, self.vae.dtype)).latent_dist
        scale = torch.tensor(self.latent_scale)
        return posterior.mean.float() * scale, posterior.logvar.float() + 2 * scale.log()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Diffusion-ready latents (B, C, h, w) -> pictures (B, 3, H, W) fp32 in [0, 1]."""
        pictures = self.vae.decode((latents / self.latent_scale).to(self.vae.dtype)).sample
        return pictures.float().div(2).add(0.5).clamp(0, 1)

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        """Returns one tensor of token ids (B, T) int64 for each text encoder, padded and truncated to its length."""
        return [
            tokenizer(
                captions,
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]

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
        """Token ids of each encoder, (B, T) -> conditioning without time_ids; fp32."""
        if self.kind == "sd":
            (encoder,) = self.text_encoders
            return {"encoder_hidden_states": encoder(token_ids[0].to(self.device)).last_hidden_state.float()}
        hidden = []
        for encoder, ids in zip(self.text_encoders, token_ids, strict=True):
            output = encoder(ids.to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2].float())  # SDXL reads the penultimate layer
        # The pooled embedding is the second encoder's projection.
        return {"encoder_hidden_states": torch.cat(hidden, dim=-1), "text_embeds": output[0].float()}

    def encode_text(self, captions: list[str]) -> Conditioning:
        """Captions -> conditioning of len(captions) rows, without time_ids; fp32 on the base's device."""
        return self.encode_tokens(self.tokenize(captions))

    def unconditional(self) -> Conditioning:
        """The unconditional embedding as one row: the empty prompt, or zeros where the base was trained so (SDXL)."""
        empty = self.encode_text([""])
        if self.empty_is_zeros:
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty

    def time_ids(self, sizes: Tensor | None = None, crops: Tensor | None = None, *, rows: int = 1) -> Tensor:
        """SDXL's micro-conditioning (rows, 6): original (height, width), crop (top, left), target (height, width).

        Without arguments: an uncropped picture of the base's resolution, as for sampling.
        """
        target = torch.full((rows, 2), float(self.resolution))
        sizes = target if sizes is None else sizes.float().cpu()
        crops = torch.zeros(rows, 2) if crops is None else crops.float().cpu()
        return torch.cat([sizes, crops, target], dim=1).to(self.device)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One forward of the UNet as it stands: the raw model output (B, C, h, w) fp32; see `Schedule.prediction`.

        Args:
            latents: (B, C, h, w) fp32.
            timesteps: (B,) int64 in [0, T).
            conditioning: rows for each latent; `time_ids` included where the base is of the SDXL family.
        """
        return unet_forward(self.unet, latents, self.schedule.time[timesteps], conditioning)


def unet_forward(unet: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """One forward of any conditional UNet in its own precision; returns its raw output in fp32."""
    refresh(unet)
    dtype = next(unet.parameters()).dtype  # the UNet's own `dtype` walks through all its modules: 21 ms of SDXL's host
    added = {k: conditioning[k].to(dtype) for k in ("text_embeds", "time_ids") if k in conditioning} or None
    output = unet(
        latents.to(dtype),
        timesteps,
        conditioning["encoder_hidden_states"].to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output.float()


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
    parts: tuple[str, ...] = ("unet", "vae", "text"),
) -> LoadedBase:
    """Loads the named parts of a diffusers folder, frozen, in evaluation mode and in `dtype` (the VAE never in fp16).

    Raises:
        UserError: the base has a fault (see `examine.examine`), or a part cannot be read.
    """
    examined = examine.examine(name, folder, base.variant)
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    index = json_of(folder / "model_index.json")
    kind = "sdxl" if examine.is_sdxl(index) else "sd"
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    loaded = LoadedBase(
        name=name,
        folder=folder,
        kind=kind,
        resolution=base.resolution,
        device=device,
        dtype=dtype,
        schedule=Schedule.variance_preserving(scheduler.alphas_cumprod, scheduler.config.prediction_type).to(device),
        scheduler_config=dict(scheduler.config),
        vae_config=json_of(folder / "vae" / "config.json"),
        examined=examined,
        empty_is_zeros=kind == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True)),
    )

    def part(cls: Any, sub: str, **options: Any) -> Any:
        try:
            module = cls.from_pretrained(folder, subfolder=sub, variant=base.variant, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder / sub}: cannot be loaded: {' '.join(str(error).split())}") from error
        return module.to(device).eval().requires_grad_(False)

    if "unet" in parts:
        loaded.unet = part(UNet2DConditionModel, "unet", torch_dtype=dtype)
        DirectAttention().install(loaded.unet)
        if device.type == "cpu" and dtype != torch.float32:
            WideAttention().install(loaded.unet)
    if "vae" in parts:
        # SDXL's VAE overflows in fp16 (diffusers#4325).
        vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        loaded.vae = part(AutoencoderKL, "vae", torch_dtype=vae_dtype)
    if "text" in parts:
        second = kind == "sdxl"
        loaded.tokenizers = [CLIPTokenizer.from_pretrained(folder / "tokenizer")]
        loaded.text_encoders = [part(CLIPTextModel, "text_encoder", dtype=dtype)]
        if second:
            loaded.tokenizers.append(CLIPTokenizer.from_pretrained(folder / "tokenizer_2"))
            loaded.text_encoders.append(part(CLIPTextModelWithProjection, "text_encoder_2", dtype=dtype))
    return loaded


def write(base: LoadedBase, folder: Path) -> None:
    """Writes a base with its UNet as it is now into an empty folder; everything else is copied."""
    for path in sorted(base.folder.iterdir()):
        if path.name.startswith("."):  # which tell where the base came from
            continue
        if path.name == "unet":
            # Under the name that the base's file has: a base is loaded in one variant.
            base.unet.save_pretrained(folder / "unet", safe_serialization=True, variant=variant(base.folder))
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
