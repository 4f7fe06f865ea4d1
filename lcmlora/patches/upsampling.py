"""The patch of diffusers' upsampling for compiled networks: no scatter in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lcmlora.patches.patch import Patch, Swap, swap


class ExpandingUpsampling(Patch):
    name = "expanding upsampling"
    replaces = "diffusers Upsample2D.forward"
    reason = (
        "Compiled, an interpolation is a gather and its gradient a scatter of atomic additions. In bf16 on a CPU torch "
        "2.13's inductor fuses the kernel that rounds the sum with the one that fills it with zeros, and so reads it "
        "before anything was added: no gradient passes. The replacement expands each pixel to four, whose gradients "
        "are summed."
    )

    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        from diffusers.models.upsampling import Upsample2D

        for module in network.modules():
            plain = isinstance(module, Upsample2D) and module.interpolate and module.norm is None
            if plain and module.use_conv and not module.use_conv_transpose:
                yield swap(module, "forward", partial(_upsample, module))


def _upsample(module: Any, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
    height, width = output_size or (2 * x.shape[-2], 2 * x.shape[-1])
    return module.conv(twice(x)[..., :height, :width])


def twice(x: Tensor) -> Tensor:
    """Returns (B, C, 2h, 2w): x (B, C, h, w) by nearest neighbours. Its first 2h - 1 rows are x at that height."""
    return x[..., :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4).flatten(2, 3)
