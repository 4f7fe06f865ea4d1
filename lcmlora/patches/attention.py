"""Patches of diffusers' attention: fewer Python calls, and fp32 in half precision on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lcmlora.patches.patch import Patch, Swap, swap


class DirectAttention(Patch):
    name = "direct attention"
    replaces = "diffusers Attention.forward"
    reason = (
        "The original inspects its processor's signature at each call, to leave out arguments that the processor does "
        "not take: 140 times in a forward of SDXL. The replacement passes all arguments."
    )

    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        from diffusers.models.attention_processor import Attention

        for module in network.modules():
            if isinstance(module, Attention):
                yield swap(module, "forward", partial(_attend, module))


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


class WideAttention(Patch):
    name = "wide attention"
    replaces = "diffusers Attention.processor"
    reason = (
        "torch 2.13 takes twelve times as long for the backward pass of attention on a CPU in bf16 as in fp32 (`python "
        '-m benchmarks.variants --only "bf16 base"`). The replacement computes attention in fp32, between projections '
        "in the network's precision."
    )

    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        from diffusers.models.attention import BasicTransformerBlock

        for block in network.modules():
            if isinstance(block, BasicTransformerBlock):
                for attention in (block.attn1, block.attn2):
                    if attention is not None:
                        yield swap(attention, "processor", _WideProcessor())


class _WideProcessor:
    """diffusers' AttnProcessor2_0 for (B, N, C) without masks, which text-to-image UNets do not use."""

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
