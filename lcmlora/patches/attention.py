"""What a UNet's attention is called by, and what it does in half precision on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def direct_attention(unet: nn.Module) -> None:
    """Has a UNet's attention call its processor without asking for that one's signature first.

    diffusers' `Attention.forward` asks at each call, to leave out what the processor does not take: 140 times in a
    forward of SDXL. Here the processor gets all there is.
    """
    from diffusers.models.attention_processor import Attention

    for attention in unet.modules():
        if isinstance(attention, Attention):
            vars(attention)["forward"] = partial(_attend, attention)


def _attend(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **further: Any,
) -> Tensor:
    output: Tensor = attention.processor(
        attention,
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=attention_mask,
        **further,
    )
    return output


def widen_attention(unet: nn.Module) -> None:
    """Has the attention of a UNet's transformer blocks computed in fp32, between projections in the UNet's precision.

    torch 2.13 takes twelve times as long for its backward pass on a CPU in bf16 as in fp32 (`python -m
    benchmarks.variants --only "bf16 base"`).
    """
    from diffusers.models.attention import BasicTransformerBlock

    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            for attention in (block.attn1, block.attn2):
                if attention is not None:
                    attention.set_processor(_WideAttention())


class _WideAttention:
    """What diffusers' AttnProcessor2_0 does of (B, N, C) without masks, which text-to-image UNets do not have."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float()
            for projected in (attention.to_q(hidden_states), attention.to_k(context), attention.to_v(context))
        )
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attention.to_out[0](attended.to(hidden_states.dtype)) / attention.rescale_output_factor
