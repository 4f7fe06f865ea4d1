"""Activations that the backward pass makes again instead of finding them in memory, without a change of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_CHEAP = (nn.GroupNorm, nn.LayerNorm, nn.SiLU)


def remake(unet: Any) -> None:
    """Has the backward pass of this UNet compute the outputs of norms and activation functions again.

    Each is a pass over memory to compute and as large as what it was computed from, which is kept anyway. Gradients are
    the same to the bit. A compiled UNet is left alone: its compiler makes this choice itself.
    """
    _Remaking(unet)


def keep(unet: Any) -> None:
    """Undoes `remake`, where that was called."""
    for module in (unet, *_cheap(unet)):
        vars(module).pop("forward", None)


def _cheap(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if isinstance(module, _CHEAP) or _is_geglu(module)]


def _is_geglu(module: nn.Module) -> bool:
    from diffusers.models.activations import GEGLU

    return isinstance(module, GEGLU)


class _Remade:
    """A tensor that is not kept for the backward pass, but computed again there when it is first asked for."""

    def __init__(self, run: Callable[..., Tensor], sources: tuple[Tensor | _Remade, ...]) -> None:
        """Args:
        run: what gave the tensor from its sources, cheaply.
        sources: are kept anyway, or can be computed again themselves.
        """
        self._run, self._sources = run, sources
        self._uses = 0
        self._value: Tensor | None = None
        for source in sources:
            if isinstance(source, _Remade):
                source.reserve()

    def reserve(self) -> None:
        """Announces a `take`."""
        self._uses += 1

    def take(self) -> Tensor:
        """Returns the tensor, which is forgotten after the last announced call."""
        if self._value is None:
            self._value = self._run(*(s.take() if isinstance(s, _Remade) else s for s in self._sources))
        value = self._value
        self._uses -= 1
        if not self._uses:
            self._value = None
        return value


class _Remaking:
    """Keeps the outputs of a UNet's norms and activation functions out of what autograd saves.

    They are followed through their tensors, not through the blocks' code: what a cheap module returns is noted while it
    lives, and whoever then saves it for the backward pass saves how it came about. Values are the same to the bit.
    """

    def __init__(self, unet: Any) -> None:
        self._noted: dict[int, tuple[weakref.ref[Tensor], _Remade]] = {}  # by address, while the tensor lives
        self._forward = unet.forward
        unet.forward = self._unet
        for module in _cheap(unet):
            if _is_geglu(module):
                vars(module)["forward"] = partial(self._geglu, module)
            else:
                vars(module)["forward"] = partial(self._once, module.forward)

    def _unet(self, *arguments: Any, **options: Any) -> Any:
        if not self._wanted():
            return self._forward(*arguments, **options)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self._forward(*arguments, **options)

    @staticmethod
    def _wanted() -> bool:
        return torch.is_grad_enabled() and not torch.compiler.is_compiling()  # which chooses for itself

    def _once(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self._note(forward, x) if self._wanted() else forward(x)

    def _geglu(self, module: Any, x: Tensor, *unused: Any, **also: Any) -> Tensor:
        """The forward of diffusers' GEGLU."""
        value, gate = module.proj(x).chunk(2, dim=-1)
        if not self._wanted():
            return value * module.gelu(gate)
        return self._note(torch.mul, value, self._note(module.gelu, gate))

    def _note(self, run: Callable[..., Tensor], *sources: Tensor) -> Tensor:
        kept = tuple(self._found(source) or source.detach() for source in sources)
        result = run(*sources)
        address = result.data_ptr()
        alive = weakref.ref(result, lambda _: self._noted.pop(address, None))
        self._noted[address] = alive, _Remade(run, kept)
        return result

    def _found(self, tensor: Tensor) -> _Remade | None:
        """Returns what was noted of these very numbers, be they in another shape."""
        if (noted := self._noted.get(tensor.data_ptr())) is None:
            return None
        alive, remade = noted
        if (result := alive()) is None or result.numel() != tensor.numel():
            return None
        same = tensor.stride() == result.stride() or (tensor.is_contiguous() and result.is_contiguous())
        return remade if same else None

    def _pack(self, tensor: Tensor) -> Tensor | tuple[_Remade, torch.Size]:
        found = self._found(tensor)
        if found is None:
            return tensor
        found.reserve()
        return found, tensor.shape

    @staticmethod
    def _unpack(packed: Tensor | tuple[_Remade, torch.Size]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        remade, shape = packed
        return remade.take().view(shape)
