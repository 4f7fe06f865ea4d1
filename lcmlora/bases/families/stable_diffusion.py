"""Stable Diffusion 1 and 2: a UNet that reads one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcmlora.adapters import layer_names, lora
from lcmlora.adapters.layer_names import Naming
from lcmlora.bases.examination import structure, vocabulary
from lcmlora.bases.examination.weightfiles import DIFFUSERS, TRANSFORMERS, json_of
from lcmlora.bases.families.family import Conditioning, Family, Part, SingleFile, network_dtype
from lcmlora.bases.schedule import Schedule
from lcmlora.errors import UserError
from lcmlora.patches.attention import DirectAttention, WideAttention

_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


class StableDiffusion(Family):
    """What `UNet2DConditionModel` and its folder need; SDXL is made of it."""

    name = "sd"
    title = "Stable Diffusion"
    pipeline = "StableDiffusionPipeline"
    network = Part("unet", ("UNet2DConditionModel",), DIFFUSERS)
    text_encoders: ClassVar[tuple[Part, ...]] = (Part("text_encoder", ("CLIPTextModel",), TRANSFORMERS),)
    tokenizers: ClassVar[tuple[Part, ...]] = (Part("tokenizer", _CLIP_TOKENIZERS),)
    placement = lora.UNET
    single_file = SingleFile(
        network=("model.diffusion_model.",),
        vae=("first_stage_model.", "vae."),
        text=("cond_stage_model.",),
        text_encoders={"text_encoder": "cond_stage_model."},
    )
    _embed_type: ClassVar[str | None] = None  # of micro-conditioning, as the UNet's configuration has it

    def recognises(self, config: dict[str, Any]) -> bool:
        is_unet = config.get("_class_name", self.network.classes[0]) == self.network.classes[0]
        return is_unet and config.get("addition_embed_type") == self._embed_type

    def naming(self, config: dict[str, Any]) -> Naming:
        return layer_names.naming_of_unet(config)

    def digested(self, index: dict[str, Any]) -> dict[str, Any]:
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        return {"second": len(self.text_encoders) == 2, "zeros": zeros}

    def check(self, folder: Path) -> None:
        unet, vae = json_of(folder / "unet" / "config.json"), json_of(folder / "vae" / "config.json")
        structure.check_class(folder / "vae" / "config.json", vae, "AutoencoderKL")
        structure.check_latents(folder, unet, vae)
        self.check_network(folder / "unet" / "config.json", unet)
        self._check_text(folder, unet, [self._text_config(folder, part) for part in self.text_encoders])

    def check_network(self, path: Path, config: dict[str, Any]) -> None:
        structure.check_unet(path, config)

    def _text_config(self, folder: Path, encoder: Part) -> dict[str, Any]:
        return structure.text_config(folder, encoder.folder)

    def examined_schedule(self, folder: Path) -> dict[str, Any]:
        return structure.schedule(folder / "scheduler" / "scheduler_config.json")

    def examined_tokenizer(self, folder: Path, tokenizer: Part, encoder: Part) -> dict[str, Any]:
        return vocabulary.examine(folder / tokenizer.folder, self._text_config(folder, encoder))

    def shapes(self, folder: Path, part: Part) -> dict[str, tuple[int, ...]]:
        if part in self.text_encoders:
            return structure.text_shapes(folder, part.folder, part.classes[0])
        path = folder / part.folder / "config.json"
        return structure.diffusers_shapes(path, json_of(path), part.classes[0])

    def _check_text(self, folder: Path, unet: dict[str, Any], texts: Sequence[dict[str, Any]]) -> None:
        """Raises UserError where the UNet does not read what the text encoders of these configurations give."""
        path = f"{folder}/unet/config.json"
        if (found := unet.get("addition_embed_type")) != self._embed_type:
            raise UserError(
                f"{path}: addition_embed_type is {found!r}, and the base has {len(texts)} text encoder(s), with which "
                f"{self.title} has {self._embed_type!r}"
            )
        width = sum(int(text["hidden_size"]) for text in texts)
        if unet.get("cross_attention_dim", 1280) != width:
            raise UserError(
                f"{path}: cross_attention_dim is {unet.get('cross_attention_dim', 1280)}, and the text encoders give "
                f"{width}; expected {self.title}'s own text encoders"
            )

    def size_unit(self, folder: Path) -> int:
        unet, vae = (json_of(folder / part / "config.json") for part in ("unet", "vae"))
        return int(self.latent_factor(vae) * 2 ** (len(unet["block_out_channels"]) - 1))  # the UNet halves them, too

    def load(self, part: Part, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
        if part == self.vae and dtype == torch.float16:
            dtype = torch.float32  # SDXL's VAE overflows in fp16 (diffusers#4325)
        return super().load(part, folder, variant, dtype)

    def prepare(self, network: Any) -> None:
        DirectAttention().install(network)
        if network.device.type == "cpu" and network.dtype != torch.float32:
            WideAttention().install(network)

    def schedule(self, folder: Path, resolution: int) -> tuple[Schedule, dict[str, Any]]:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        kind = scheduler.config.prediction_type
        return Schedule.variance_preserving(scheduler.alphas_cumprod, kind), dict(scheduler.config)

    def forward(self, network: Any, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = network_dtype(network)
        added = {k: conditioning[k].to(dtype) for k in ("text_embeds", "time_ids") if k in conditioning} or None
        output = network(
            latents.to(dtype),
            time,
            conditioning["encoder_hidden_states"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output.float()

    def encode_tokens(self, text_encoders: Sequence[Any], token_ids: Sequence[Tensor]) -> Conditioning:
        (encoder,), (ids,) = text_encoders, token_ids
        return {"encoder_hidden_states": encoder(ids.to(encoder.device)).last_hidden_state.float()}
