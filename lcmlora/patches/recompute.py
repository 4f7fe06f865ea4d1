"""Patches that recompute activations in the backward pass instead of keeping them (activation checkpointing)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lcmlora.patches.patch import Patch, Swap, swap
from lcmlora.patches.torch_internals import address

_CHEAP = (nn.GroupNorm, nn.LayerNorm, nn.SiLU)


class FullRecompute(Patch):
    name = "full recompute"
    replaces = "diffusers' function for gradient checkpointing"
    reason = (
        "Keeps the input of each block alone and costs another forward. Unlike torch's and diffusers' own default, the "
        "replacement keeps no state of random generators, which these blocks do not use."
    )

    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        for module in network.modules():
            if hasattr(module, "gradient_checkpointing"):
                yield swap(module, "_gradient_checkpointing_func", _recompute_block)
                yield swap(module, "gradient_checkpointing", True)


def _recompute_block(block: nn.Module, *arguments: Any) -> Any:
    """Runs a block, keeping its arguments alone; in the backward pass it runs up to the last input needed there."""
    return checkpoint(block.__call__, *arguments, use_reentrant=False, preserve_rng_state=False)


class SelectiveRecompute(Patch):
    name = "selective recompute"
    replaces = "forward of the network, of its norms, SiLU and diffusers' GEGLU"
    reason = (
        "The outputs of norms and activation functions are as large as their inputs, which are kept anyway, and take "
        "one pass over memory to compute again. Gradients are the same to the bit. A compiled network is left alone: "
        "its compiler makes this choice itself."
    )

    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        outputs = _Outputs(network.forward)
        yield swap(network, "forward", outputs.run)
        for module in network.modules():
            if _is_geglu(module):
                yield swap(module, "forward", partial(outputs.geglu, module))
            elif isinstance(module, _CHEAP):
                yield swap(module, "forward", partial(outputs.cheap, module.forward))


def _is_geglu(module: nn.Module) -> bool:
    from diffusers.models.activations import GEGLU

    return isinstance(module, GEGLU)


class _Recomputed:
    """A tensor that is not kept for the backward pass, but computed again there when it is first asked for."""

    def __init__(self, run: Callable[..., Tensor], sources: tuple[Tensor | _Recomputed, ...]) -> None:
        """Args:
        run: computes the tensor from its sources, cheaply.
        sources: are kept anyway, or can be recomputed themselves.
        """
        self._run, self._sources = run, sources
        self._uses = 0
        self._value: Tensor | None = None
        for source in sources:
            if isinstance(source, _Recomputed):
                source.reserve()

    def reserve(self) -> None:
        """Announces a `take`."""
        self._uses += 1

    def take(self) -> Tensor:
        """Returns the tensor, which is forgotten after the last announced call."""
        if self._value is None:
            self._value = self._run(*(s.take() if isinstance(s, _Recomputed) else s for s in self._sources))
        value = self._value
        self._uses -= 1
        if not self._uses:
            self._value = None
        return value


class _Outputs:
    """Keeps the outputs of a network's norms and activation functions out of what autograd saves.

    They are followed through their tensors, not through the blocks' code: the output of a cheap module is noted while
    it lives, and where autograd then saves it for the backward pass, how it was computed is saved instead.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        """Args:
        forward: the network's own.
        """
        # By address, while the tensor lives.
        self._noted: dict[tuple[int, int], tuple[weakref.ref[Tensor], _Recomputed]] = {}
        self._forward = forward

    def run(self, *arguments: Any, **options: Any) -> Any:
        """The network's forward."""
        if not self._is_active():
            return self._forward(*arguments, **options)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self._forward(*arguments, **options)

    @staticmethod
    def _is_active() -> bool:
        return torch.is_grad_enabled() and not torch.compiler.is_compiling()  # a compiler chooses for itself

    def cheap(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The forward of a norm or SiLU."""
        return self._run_and_note(forward, x) if self._is_active() else forward(x)

    def geglu(self, module: Any, x: Tensor, *unused: Any, **unused_options: Any) -> Tensor:
        """The forward of diffusers' GEGLU."""
        value, gate = module.proj(x).chunk(2, dim=-1)
        if not self._is_active():
            return value * module.gelu(gate)
        return self._run_and_note(torch.mul, value, self._run_and_note(module.gelu, gate))

    def _run_and_note(self, run: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        kept = tuple(self._recomputation_of(source) or source.detach() for source in sources)
        result = run(*sources)
        where = address(result)
        alive = weakref.ref(result, lambda _: self._noted.pop(where, None))
        self._noted[where] = alive, _Recomputed(run, kept)
        return result

    def _recomputation_of(self, tensor: Tensor) -> _Recomputed | None:
        """Returns how to compute this tensor again if it is a noted result, perhaps reshaped; None if it is not."""
        if (noted := self._noted.get(address(tensor))) is None:
            return None
        alive, recomputed = noted
        if (result := alive()) is None or result.numel() != tensor.numel():
            return None
        same = tensor.stride() == result.stride() or (tensor.is_contiguous() and result.is_contiguous())
        return recomputed if same else None

    def _pack(self, tensor: Tensor) -> Tensor | tuple[_Recomputed, torch.Size]:
        found = self._recomputation_of(tensor)
        if found is None:
            return tensor
        found.reserve()
        return found, tensor.shape

    @staticmethod
    def _unpack(packed: Tensor | tuple[_Recomputed, torch.Size]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recomputed, shape = packed
        return recomputed.take().view(shape)
