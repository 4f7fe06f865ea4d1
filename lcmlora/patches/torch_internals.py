"""Undocumented parts of torch that lcmlora relies on. tests/test_internals.py tries each.

The core runs with torch 2.11, too.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

VERSION = "2.13"  # that this was written against

_Tensors = list[Tensor] | tuple[Tensor, ...]

# One kernel over a list of tensors; torch.optim is built on them.
foreach_copy_: Callable[[_Tensors, _Tensors], None] = torch._foreach_copy_
foreach_mul: Callable[[_Tensors, float], tuple[Tensor, ...]] = torch._foreach_mul
foreach_sub: Callable[[_Tensors, _Tensors], tuple[Tensor, ...]] = torch._foreach_sub
foreach_norm: Callable[[_Tensors], tuple[Tensor, ...]] = torch._foreach_norm
foreach_lerp_: Callable[[_Tensors, _Tensors, float], None] = torch._foreach_lerp_

# What torch.amp.GradScaler.update runs: (scale, growth tracker, found inf, growth factor, backoff factor, interval).
amp_update_scale_: Callable[[Tensor, Tensor, Tensor, float, float, int], Tensor] = torch._amp_update_scale_

# Returns how often autograd has seen this tensor changed in place.
version_of: Callable[[Tensor], int] = attrgetter("_version")

COMPILED_CALL = "_compiled_call_impl"  # of a module: what nn.Module.compile sets and nn.Module.__call__ runs


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns a layer's convolution, with its stride and padding mode, by another weight."""
    return layer._conv_forward(x, weight, bias)


def allow_graphs(count: int) -> None:
    """Has torch.compile make up to this many graphs of one function before it falls back to eager."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = count


def has_cpp_compiler() -> bool:
    """Returns whether inductor finds a C++ compiler on the PATH."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
