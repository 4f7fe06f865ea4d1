from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from lcmlora import bases
from lcmlora.config import Base
from lcmlora.patches.attention import DirectAttention, WideAttention
from tests.support.distillation import CPU
from tests.support.miniature import RESOLUTION


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_wide_attention_is_diffusers_own_in_fp32(miniatures: Callable[[str], Path], architecture: str):
    folder = miniatures(architecture)
    settings = Base(source=str(folder), resolution=RESOLUTION, license="mit")
    base = bases.load("mini", settings, folder, device=CPU, parts=("network", "text"))
    conditioning = base.encode_text(["a red apple", "a tree"])
    conditioning |= base.micro_conditioning(rows=2)
    x, t = torch.randn(2, *base.latent_shape), torch.tensor([999, 259])
    expected = base.predict(x, t, conditioning)
    WideAttention().install(base.network)
    changed = {type(processor).__name__ for processor in base.network.attn_processors.values()}
    assert changed == {"_WideProcessor"}
    torch.testing.assert_close(base.predict(x, t, conditioning), expected, atol=1e-6, rtol=1e-5)


def test_direct_attention_is_diffusers_own_to_the_bit(base_folder: Path):
    unet = UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet").eval()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    expected = unet(x, torch.tensor([999, 259]), text).sample
    DirectAttention().install(unet)
    assert torch.equal(unet(x, torch.tensor([999, 259]), text).sample, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_in_half_precision_on_a_cpu_have_it(base_folder: Path, dtype: torch.dtype):
    settings = Base(source=str(base_folder), resolution=RESOLUTION, license="mit")
    unet = bases.load("mini", settings, base_folder, device=CPU, dtype=dtype, parts=("network",)).network
    plain = [isinstance(processor, AttnProcessor2_0) for processor in unet.attn_processors.values()]
    assert all(plain) if dtype == torch.float32 else not any(plain)
