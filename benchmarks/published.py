"""Bases of the published sizes with random weights: what a step costs does not depend on their values."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcmlora import bases, config
from lcmlora.data.sources.emoji import Subject
from lcmlora.demo.pretrain import SCHEDULE, train_tokenizer

_TOKENS = 77
# OpenAI's CLIP ViT-L/14 and OpenCLIP's ViT-bigG/14, the text half.
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def save(model: str, folder: Path) -> None:
    """Writes a base of the size of `bases.MODEL` in params.yaml to the folder, in bf16; on a GPU where there is one."""
    source = config.load(Path("params.yaml")).base(model).source
    packaged = json.loads(resources.files("lcmlora").joinpath("architectures.json").read_text(encoding="utf-8"))
    architecture = packaged[source]
    schedule = {key: SCHEDULE[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    scheduler = DDIMScheduler(**schedule, num_train_timesteps=1000)
    words = Subject("1f34e", "red apple", ("fruit",), "food-drink")
    tokenizer = train_tokenizer((words,), 600)
    tokenizer.model_max_length = _TOKENS
    torch.manual_seed(0)
    with bases.pick_device("auto"), torch.random.fork_rng():
        torch.set_default_dtype(torch.bfloat16)
        try:
            unet = UNet2DConditionModel(**architecture)
            parts: dict[str, Any] = {"unet": unet, "scheduler": scheduler, "tokenizer": tokenizer}
            if "addition_embed_type" in architecture:
                text = CLIPTextModelWithProjection(_text(tokenizer, _CLIP_G, "gelu"))
                parts |= {"vae": _vae(0.13025), "text_encoder": CLIPTextModel(_text(tokenizer, _CLIP_L, "quick_gelu"))}
                pipeline: Any = StableDiffusionXLPipeline(
                    **parts, text_encoder_2=text, tokenizer_2=tokenizer, add_watermarker=False
                )
            else:
                parts |= {"vae": _vae(0.18215), "text_encoder": CLIPTextModel(_text(tokenizer, _CLIP_L, "quick_gelu"))}
                pipeline = StableDiffusionPipeline(
                    **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
                )
        finally:
            torch.set_default_dtype(torch.float32)
    pipeline.save_pretrained(folder)


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=scaling_factor,
    )


def _text(tokenizer: CLIPTokenizer, sizes: dict[str, int], act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        **sizes,
        vocab_size=len(tokenizer),
        projection_dim=sizes["hidden_size"],
        max_position_embeddings=_TOKENS,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
