"""The patch of PEFT's LoRA layers: a forward of few kernels in the base's precision, with fp32 gradients.

A layer then computes with tensors derived from its A and B: either their sum with the base's weight, or copies of both
in the base's precision. All passes that see the same A and B share them; `refresh` brings them up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lcmlora.patches.patch import Patch, Swap, swap
from lcmlora.patches.torch_internals import convolve, foreach_copy_, foreach_mul, version_of

# The derived tensors of each patched network's layers.
_derived: WeakKeyDictionary[nn.Module, list[Derived]] = WeakKeyDictionary()


@dataclass(frozen=True)
class LoraForwards(Patch):
    """Args:
    merged: one kernel over W + scale B A. Default: merged where that is cheaper. Never in half precision on a GPU:
        there the small updates of a new adapter would be lost in rounding.
    """

    merged: bool | None = None

    name = "LoRA forwards"
    replaces = "PEFT LoraLayer.forward"
    reason = (
        "PEFT casts the input to fp32, multiplies by A and B there, scales the product apart and casts it back. The "
        "replacement casts A and B instead, once for all passes of a step, or adds their product to the base's weight."
    )

    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        swaps = []
        derived: list[Derived] = []
        for layer in _lora_layers(network):
            if merging_pays(layer) if self.merged is None else self.merged:
                merged = _MergedWeight(layer)
                swaps.append(swap(layer, "forward", _merged_forward(merged), "merged"))
                derived.append(merged)
            else:
                factors = _Factors(layer)
                swaps.append(swap(layer, "forward", _factored_forward(factors), "beside the base's weight"))
                derived.append(factors)
        _derived[network] = derived
        return swaps

    def undo(self, network: nn.Module) -> None:
        super().undo(network)
        _derived.pop(network, None)


def _lora_layers(network: nn.Module) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in network.modules() if isinstance(module, LoraLayer))


def _only_adapter(layer: Any) -> str:
    """Returns the name of the adapter of a LoRA layer; these forwards run one."""
    (name,) = layer.lora_A
    return str(name)


def merging_pays(layer: Any) -> bool:
    """Returns whether W + scale B A takes fewer operations than A and B beside W, and its rounding can be afforded."""
    name = _only_adapter(layer)
    weight, inner = layer.base_layer.weight, layer.lora_A[name].weight
    if weight.dtype != torch.float32 and weight.device.type != "cpu":
        return False
    # Cost per position: merged, one product of W's size for the gradient; separate, three of A's and B's size.
    return 3 * (inner.numel() + layer.lora_B[name].weight.numel()) > weight.numel()


class Derived:
    """The tensors that a layer's passes compute with, derived once from A and B for all passes with the same A and B.

    They are leaves of autograd, and the gradient they get is passed on to A and B. Whether A and B have changed is told
    by autograd's count of in-place changes, which does not see changes through `.data` or another view (see
    `Optimization`).
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.name = layer, _only_adapter(layer)
        self.a, self.b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
        self.scale: float = layer.scaling[self.name]
        self.copies: list[tuple[Tensor, Tensor, float]] = []  # leaf, the tensor it is a copy of, and times what
        self._versions: tuple[int, int] | None = None  # of A and B when this was derived

    def stale(self) -> bool:
        return self._versions != (version_of(self.a), version_of(self.b)) and not self.layer.disable_adapters

    def derive(self) -> None:
        """Computes what is not a copy."""
        self._versions = version_of(self.a), version_of(self.b)

    def expire(self) -> None:
        """Marks the derived tensors as outdated; the next pass computes them again."""
        self._versions = None


class _MergedWeight(Derived):
    """W + scale B A, summed in fp32."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight = layer.base_layer.weight
        self.merged = torch.empty_like(self.weight, memory_format=torch.contiguous_format).requires_grad_()
        self.merged.register_post_accumulate_grad_hook(self._pass_on)
        self._views: tuple[Tensor, ...] = ()  # W, A, B and their sum as matrices, which autograd does not follow

    def derive(self) -> None:
        if not self._views or self._views[1].data_ptr() != self.a.data_ptr():  # parameters move, to one buffer
            self._views = tuple(tensor.detach().flatten(1) for tensor in (self.weight, self.a, self.b, self.merged))
        weight, a, b, merged = self._views
        if weight.dtype == b.dtype:
            torch.addmm(weight, b, a, alpha=self.scale, out=merged)
        else:
            torch.add(weight, b @ a, alpha=self.scale, out=merged)
        super().derive()

    def _pass_on(self, merged: Tensor) -> None:
        _, a, b, _ = self._views
        gradient = _take_gradient(merged).flatten(1)
        _add_gradient(self.a, b.t() @ gradient, self.scale)
        _add_gradient(self.b, gradient @ a.t(), self.scale)


class _Factors(Derived):
    """A and scale B in the base's precision."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.down, self.up = (self._copy(*pair) for pair in ((self.a, 1.0), (self.b, self.scale)))

    def _copy(self, source: Tensor, factor: float) -> Tensor:
        dtype = self.layer.base_layer.weight.dtype
        if dtype == source.dtype and factor == 1:
            return source
        leaf = torch.empty_like(source, dtype=dtype, requires_grad=True)
        self.copies.append((leaf, source, factor))
        leaf.register_post_accumulate_grad_hook(lambda leaf: _add_gradient(source, _take_gradient(leaf), factor))
        return leaf


def _take_gradient(leaf: Tensor) -> Tensor:
    """Returns the gradient of a leaf in fp32; the leaf then has none."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient.float()


def _add_gradient(parameter: Tensor, gradient: Tensor, factor: float) -> None:
    gradient = gradient.view_as(parameter)
    if factor != 1:
        gradient = gradient * factor
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def derived(network: nn.Module) -> list[Derived]:
    """Returns the derived tensors of a patched network's layers; none where it is not patched."""
    return _derived.get(network, [])


def refresh(network: nn.Module) -> None:
    """Brings the derived tensors of all layers up to date with A and B.

    Compiled layers do not do so themselves. And together they take a GPU a few kernels; one by one, two each.
    """
    _refresh(derived(network))


def _refresh(derived: Iterable[Derived]) -> None:
    if not (stale := [each for each in derived if each.stale()]):
        return
    copies = [copy for each in stale for copy in each.copies]
    with torch.no_grad():
        for factor in {factor for *_, factor in copies}:
            leaves, sources = zip(*((leaf, source) for leaf, source, f in copies if f == factor), strict=True)
            foreach_copy_(leaves, sources if factor == 1 else foreach_mul(sources, factor))
        for each in stale:
            each.derive()


def _merged_forward(merged: _MergedWeight) -> Callable[[Tensor], Tensor]:
    layer, base = merged.layer, merged.layer.base_layer
    convolution = isinstance(base, nn.Conv2d)
    pointwise = convolution and base.kernel_size == base.stride == (1, 1) and base.groups == 1 and not any(base.padding)
    pointwise = pointwise and base.weight.device.type == "cpu"

    def forward(x: Tensor) -> Tensor:
        if layer.disable_adapters:
            return base(x)
        compiling = torch.compiler.is_compiling()
        if not compiling and merged.stale():
            _refresh((merged,))
        if not convolution:
            return nn.functional.linear(x, merged.merged, base.bias)
        if pointwise and not compiling:
            return _pointwise(x, merged.merged, base.bias)
        return convolve(base, x, merged.merged, base.bias)

    return forward


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns a convolution of kernel 1 as matrix products, which take a CPU half of the time: nothing is copied into
    the layout of convolutions and back."""
    weight, pixels = weight.flatten(1).expand(len(x), -1, -1), x.flatten(2)
    product = torch.bmm(weight, pixels) if bias is None else torch.baddbmm(bias[:, None], weight, pixels)
    return product.unflatten(2, x.shape[2:])


def _factored_forward(factors: _Factors) -> Callable[[Tensor], Tensor]:
    layer, base = factors.layer, factors.layer.base_layer
    convolution = isinstance(base, nn.Conv2d)
    inner = layer.lora_A[factors.name]

    def forward(x: Tensor) -> Tensor:
        if layer.disable_adapters:
            return base(x)
        if not torch.compiler.is_compiling() and factors.stale():
            _refresh((factors,))
        if convolution:
            return base(x) + nn.functional.conv2d(convolve(inner, x, factors.down, None), factors.up)
        alone, low = base(x), nn.functional.linear(x, factors.down)
        return torch.addmm(alone.flatten(0, -2), low.flatten(0, -2), factors.up.t()).view_as(alone)

    return forward
