"""All that differs between base models: loading, text conditioning, micro-conditioning, latents, prediction type.

The rest of the package sees one interface. What can be read from the base's own folder (architecture, schedule,
prediction type, VAE scaling) is read there and never configured.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.files import sha256_folder

# What a UNet is given besides latents and timestep: `encoder_hidden_states` (B, T, C) and, for the SDXL family,
# `text_embeds` (B, P) and `time_ids` (B, 6).
Conditioning = dict[str, Tensor]

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # never a pickle


def fetch(name: str, base: Base, root: Path = Path("bases")) -> Path:
    """Puts the base at `root/name` and returns that folder: downloads a hub id at its revision, links a local folder.

    Idempotent; a changed revision downloads again.

    Raises:
        UserError: a hub id without revision, a folder without the parts of a pipeline, or an unreachable hub.
    """
    target = root / name
    source = Path(base.source)
    if source.exists() or base.source.startswith((".", "/", "bases/")):
        check_folder(source)
        if source.resolve() != target.resolve():
            root.mkdir(parents=True, exist_ok=True)
            if target.is_symlink():
                target.unlink()
            if target.exists():
                raise UserError(f"{target} is in the way of the link to {source}; move it or rename the base")
            target.symlink_to(source.resolve(), target_is_directory=True)
        return target
    if base.revision is None:
        raise UserError(
            f"bases.{name}.revision: {base.source} is a hub id and needs a pinned commit to be reproducible"
        )
    marker = target / ".revision"
    wanted = f"{base.source}@{base.revision}\n"
    if marker.is_file() and marker.read_text() == wanted:
        return target
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"*.{base.variant}.safetensors", *_FILES[:-1]] if base.variant else _FILES
    try:
        snapshot_download(
            base.source,
            revision=base.revision,
            local_dir=target,
            allow_patterns=patterns,
            # Single-file checkpoints at the top would double the download.
            ignore_patterns=["*.ckpt", "safety_checker/*", "*_lora*", "v1-*", "sd_xl_*", "SSD-1B*"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"bases.{name}: cannot download {base.source} at {base.revision}: {error}") from error
    check_folder(target)
    marker.write_text(wanted)
    return target


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder is not a Stable Diffusion or SDXL pipeline in diffusers' layout."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such base folder")
    for part in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler", "tokenizer", "text_encoder"):
        if not (folder / part).exists():
            missing = part.split("/")[0]
            shown = f"{missing}/" if missing != "model_index.json" else missing
            raise UserError(f"{folder}: a diffusers base needs {shown}, and there is none")


def identity(base: Base, folder: Path) -> dict[str, str | None]:
    """Returns what names a base for good: its source, its pinned revision and a digest of its UNet's files."""
    return {"source": base.source, "revision": base.revision, "digest": sha256_folder(folder / "unet")}


@dataclass
class LoadedBase:
    """A base in memory, frozen and in evaluation mode. Made by `load`."""

    name: str
    folder: Path
    kind: str  # "sd" or "sdxl" (two text encoders, micro-conditioning)
    resolution: int
    device: torch.device
    dtype: torch.dtype
    prediction_type: str
    scheduler_config: dict[str, Any]
    alphas_cumprod: Tensor  # (T,) fp32 on `device`
    vae_config: dict[str, Any]
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
        if self.kind == "sdxl":
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
        """One forward of the UNet as it stands: the raw model output (B, C, h, w) fp32, in `prediction_type`.

        Args:
            latents: (B, C, h, w) fp32.
            timesteps: (B,) int64 in [0, T).
            conditioning: rows for each latent; `time_ids` included where the base is of the SDXL family.
        """
        return unet_forward(self.unet, latents, timesteps, conditioning)


def unet_forward(unet: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """One forward of any conditional UNet in its own precision; returns its raw output in fp32."""
    dtype = unet.dtype
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
    """`auto` is bf16 on a GPU that has it and fp32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
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
        UserError: a part is missing from the folder or cannot be read.
    """
    check_folder(folder)
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    index = json.loads((folder / "model_index.json").read_text())
    kind = "sdxl" if "text_encoder_2" in index and index["text_encoder_2"][0] else "sd"
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    loaded = LoadedBase(
        name=name,
        folder=folder,
        kind=kind,
        resolution=base.resolution,
        device=device,
        dtype=dtype,
        prediction_type=scheduler.config.prediction_type,
        scheduler_config=dict(scheduler.config),
        alphas_cumprod=scheduler.alphas_cumprod.float().to(device),
        vae_config=json.loads((folder / "vae" / "config.json").read_text()),
    )

    def part(cls: Any, sub: str, **options: Any) -> Any:
        try:
            module = cls.from_pretrained(folder, subfolder=sub, variant=base.variant, use_safetensors=True, **options)
        except OSError as error:
            raise UserError(f"{folder / sub}: cannot be loaded: {' '.join(str(error).split())}") from error
        return module.to(device).eval().requires_grad_(False)

    if "unet" in parts:
        loaded.unet = part(UNet2DConditionModel, "unet", torch_dtype=dtype)
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
