"""SDXL: a UNet that is conditioned on two CLIP text encoders and on a picture's size and crop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmlora.bases.examination import structure, vocabulary
from lcmlora.bases.examination.library_config import DigestInput, LibraryConfig
from lcmlora.bases.examination.structure import TextConfig
from lcmlora.bases.examination.weightfiles import TRANSFORMERS
from lcmlora.bases.families.family import Conditioning, Part, SingleFile
from lcmlora.bases.families.stable_diffusion import TEXT_PARAMETERS, StableDiffusion
from lcmlora.errors import UserError

SECOND_TEXT_PARAMETERS = 694_659_840  # of OpenCLIP ViT-bigG/14 with its projection (arXiv 2307.01952)


class SDXL(StableDiffusion):
    """Stable Diffusion with a second text encoder, its pooled embedding and micro-conditioning."""

    name = "sdxl"
    title = "SDXL"
    pipeline = "StableDiffusionXLPipeline"
    text_encoders = (
        *StableDiffusion.text_encoders,
        Part("text_encoder_2", ("CLIPTextModelWithProjection",), TRANSFORMERS),
    )
    tokenizers = (*StableDiffusion.tokenizers, Part("tokenizer_2", StableDiffusion.tokenizers[0].classes))
    single_file = SingleFile(
        network=("model.diffusion_model.",),
        vae=("first_stage_model.", "vae."),
        text=("conditioner.embedders.",),
        text_encoders={"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
    )
    _embed_type = "text_time"

    def _text_config(self, folder: Path, encoder: Part) -> TextConfig:
        return structure.read_text_config(folder / encoder.folder, penultimate=encoder == self.text_encoders[1])

    def examine_tokenizer(self, folder: Path, tokenizer: Part, encoder: Part) -> DigestInput:
        config, pooled = self._text_config(folder, encoder), encoder == self.text_encoders[1]
        return vocabulary.examine_tokenizer(folder / tokenizer.folder, config, pooled=pooled)

    def _check_text(self, unet: LibraryConfig, texts: Sequence[TextConfig]) -> None:
        super()._check_text(unet, texts)
        inputs = unet.get("projection_class_embeddings_input_dim")
        time = unet.get("addition_time_embed_dim")
        pooled = texts[1].projection_dim
        if not isinstance(time, int) or inputs != pooled + 6 * time:
            raise UserError(
                f"{unet.place}: projection_class_embeddings_input_dim is {inputs}; expected the second text encoder's "
                f"{pooled} and 6 times addition_time_embed_dim ({time}): six numbers of size and crop. SDXL's refiner "
                "has five"
            )

    def input_shapes(self, config: LibraryConfig, tokens: int | None = None) -> dict[str, tuple[int, ...]]:
        sizes = 6
        pooled = config.integer("projection_class_embeddings_input_dim", 2816) - sizes * config.integer(
            "addition_time_embed_dim", 256
        )
        return super().input_shapes(config, tokens) | {"text_embeds": (pooled,), "time_ids": (sizes,)}

    def usual_text_parameters(self, config: LibraryConfig) -> int:
        return TEXT_PARAMETERS[768] + SECOND_TEXT_PARAMETERS

    def micro_conditioning(self, sizes: Tensor, crops: Tensor, targets: Tensor) -> Conditioning:
        """`time_ids` (B, 6): original (height, width), crop (top, left), target (height, width)."""
        return {"time_ids": torch.cat([sizes, crops, targets], dim=1).float()}

    def encode_tokens(self, text_encoders: Sequence[Any], token_ids: Sequence[Tensor]) -> Conditioning:
        hidden = []
        for encoder, ids in zip(text_encoders, token_ids, strict=True):
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2].float())  # SDXL reads the penultimate layer
        # The pooled embedding is the second encoder's projection.
        return {"encoder_hidden_states": torch.cat(hidden, dim=-1), "text_embeds": output[0].float()}

    def empty_is_zeros(self, index: LibraryConfig) -> bool:
        return index.flag("force_zeros_for_empty_prompt", True)
