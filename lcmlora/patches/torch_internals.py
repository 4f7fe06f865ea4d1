"""Undocumented parts of torch that lcmlora relies on. tests/test_internals.py tries each.

The core runs with torch 2.11, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operation, below autograd
from torch.utils._pytree import tree_iter

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

# Attention in pieces, with its backward pass: (q, k, v) -> output and what the backward pass needs. q: (B, H, N, D).
_flash = torch.ops.aten._scaled_dot_product_flash_attention

COMPILED_CALL = "_compiled_call_impl"  # of a module: what nn.Module.compile sets and nn.Module.__call__ runs


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns a layer's convolution, with its stride and padding mode, by another weight."""
    return layer._conv_forward(x, weight, bias)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns attention without masks by the kernel that never holds a matrix of all pairs; on a GPU or meta device."""
    output: Tensor = _flash(query, key, value)[0]
    return output


def run_backward(loss: Tensor) -> None:
    """Computes the gradients of a loss (), with the modes of torch functions that are on.

    Within Tensor.backward they are off, also for the forwards that activation checkpointing runs there.
    """
    gradient = (torch.ones_like(loss),)
    torch.autograd.graph._engine_run_backward(
        (loss,), gradient, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def tensors_of(result: object) -> Iterator[Tensor]:
    """Yields the tensors in what an operation returns."""
    return (each for each in tree_iter(result) if isinstance(each, Tensor))


def storage_key(tensor: Tensor) -> int:
    """Returns a number that only tensors of the same storage have, while it lives; on the meta device, too."""
    return int(tensor.untyped_storage()._cdata)


def address(tensor: Tensor) -> tuple[int, int]:
    """Returns where a tensor's numbers begin. On the meta device, which has no memory, a number stands for its storage.

    Two tensors have the same address if they are views of one storage with the same beginning.
    """
    return (storage_key(tensor), int(tensor.storage_offset())) if tensor.is_meta else (tensor.data_ptr(), 0)


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
