"""A Stable Diffusion folder in miniature: every part real, with random weights; loads in a tenth of a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lcmlora.data.emoji import Subject
from lcmlora.pretrain import SCHEDULE, TOKENS, train_tokenizer

RESOLUTION = 16


def save_base(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Writes the folder and returns it; the same weights each time."""
    torch.manual_seed(0)
    words = Subject("1f34e", "red apple", ("fruit", "green", "tree"), "food-drink")
    tokenizer = train_tokenizer((words,), 600)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        projection_dim=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=RESOLUTION,
            scaling_factor=0.5,
        ),
        unet=UNet2DConditionModel(
            sample_size=RESOLUTION // 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE | {"prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
