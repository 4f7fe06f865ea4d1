"""Stable Diffusion 1 and 2: a UNet that is conditioned on one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lcmlora.adapters import layer_names, lora
from lcmlora.adapters.layer_names import Naming
from lcmlora.bases.examination import structure, vocabulary
from lcmlora.bases.examination.library_config import DigestInput, LibraryConfig
from lcmlora.bases.examination.structure import Shapes, TextConfig
from lcmlora.bases.examination.weightfiles import DIFFUSERS, TRANSFORMERS
from lcmlora.bases.families.family import Conditioning, Family, Part, SingleFile, network_dtype
from lcmlora.bases.schedule import Schedule
from lcmlora.errors import UserError
from lcmlora.patches.attention import DirectAttention, WideAttention

# Parameters of the text encoders of published bases, by the width of their output: CLIP ViT-L/14 (arXiv 2103.00020),
# and OpenCLIP ViT-H/14 up to its penultimate layer (arXiv 2212.07143). tests/doctor builds them and counts.
TEXT_PARAMETERS = {768: 123_060_480, 1024: 340_387_840}
TOKENS = 77  # that they read of a caption

_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


class StableDiffusion(Family):
    """Bases with a `UNet2DConditionModel`; SDXL is a subclass."""

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
    _embed_type: ClassVar[str | None] = None  # `addition_embed_type` of the UNet's configuration

    def recognises(self, config: LibraryConfig) -> bool:
        is_unet = config.get("_class_name", self.network.classes[0]) == self.network.classes[0]
        return is_unet and config.get("addition_embed_type") == self._embed_type

    def naming(self, config: LibraryConfig) -> Naming:
        return layer_names.naming_of_unet(config)

    def drawing_options(self, index: LibraryConfig) -> DigestInput:
        zeros = index.flag("force_zeros_for_empty_prompt", True)
        return {"second": len(self.text_encoders) == 2, "zeros": zeros}

    def check(self, folder: Path) -> None:
        unet, vae = (LibraryConfig.read(folder / part / "config.json") for part in ("unet", "vae"))
        structure.check_class(vae, "AutoencoderKL")
        structure.check_latents(unet, vae)
        self.check_network(unet)
        self._check_text(unet, [self._text_config(folder, part) for part in self.text_encoders])

    def check_network(self, config: LibraryConfig) -> None:
        structure.check_unet(config)

    def _text_config(self, folder: Path, encoder: Part) -> TextConfig:
        return structure.read_text_config(folder / encoder.folder)

    def examine_schedule(self, folder: Path) -> DigestInput:
        return structure.examine_schedule(folder / "scheduler" / "scheduler_config.json")

    def examine_tokenizer(self, folder: Path, tokenizer: Part, encoder: Part) -> DigestInput:
        return vocabulary.examine_tokenizer(folder / tokenizer.folder, self._text_config(folder, encoder))

    def shapes(self, folder: Path, part: Part) -> Shapes:
        if part in self.text_encoders:
            return structure.text_shapes(folder / part.folder, part.classes[0])
        config = LibraryConfig.read(folder / part.folder / "config.json")
        return structure.diffusers_shapes(config, part.classes[0])

    def _check_text(self, unet: LibraryConfig, texts: Sequence[TextConfig]) -> None:
        """Raises UserError if the UNet's inputs are not the outputs of text encoders of these configurations."""
        if (embed_type := unet.get("addition_embed_type")) != self._embed_type:
            raise UserError(
                f"{unet.place}: addition_embed_type is {embed_type!r}, and the base has {len(texts)} text encoder(s), "
                f"with which {self.title} has {self._embed_type!r}"
            )
        width = sum(text.hidden_size for text in texts)
        if (inputs := unet.get("cross_attention_dim", 1280)) != width:
            raise UserError(
                f"{unet.place}: cross_attention_dim is {inputs}, and the text encoders give {width}; expected "
                f"{self.title}'s own text encoders"
            )

    def size_unit(self, folder: Path) -> int:
        unet, vae = (LibraryConfig.read(folder / part / "config.json") for part in ("unet", "vae"))
        # Each of the UNet's blocks but the last halves the latent's sides.
        return int(self.latent_factor(vae) * 2 ** (unet.length("block_out_channels", 4) - 1))

    def input_shapes(self, config: LibraryConfig, tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (tokens or TOKENS, config.integer("cross_attention_dim", 1280))}

    def usual_vae(self) -> LibraryConfig:
        # AutoencoderKL of arXiv 2112.10752, f = 8, with 4 channels, as all published bases have it.
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        sizes = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
        return LibraryConfig(blocks | sizes, f"the VAE of {self.title}")

    def usual_text_parameters(self, config: LibraryConfig) -> int:
        width = config.integer("cross_attention_dim", 1280)
        if width not in TEXT_PARAMETERS:
            raise UserError(f"{config.place}: cross_attention_dim: {width} is none of {self.title}'s text encoders")
        return TEXT_PARAMETERS[width]

    def load(self, part: Part, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
        if part == self.vae and dtype == torch.float16:
            dtype = torch.float32  # SDXL's VAE overflows in fp16 (diffusers#4325)
        return super().load(part, folder, variant, dtype)

    def prepare(self, network: Any) -> None:
        DirectAttention().install(network)
        if network.device.type == "cpu" and network.dtype != torch.float32:
            WideAttention().install(network)

    def schedule(self, folder: Path, resolution: int) -> tuple[Schedule, LibraryConfig]:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        schedule = Schedule.variance_preserving(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        return schedule, LibraryConfig.of_module(scheduler)

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
