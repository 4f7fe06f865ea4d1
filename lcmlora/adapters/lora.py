"""The adapter: inject, collect, average, save in the diffusers format, load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lcmlora.adapters.facts import WEIGHTS as WEIGHTS
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write

Layers = dict[str, tuple[Tensor, Tensor]]  # A and B by the module's name

# The attributes of the layers that carry an adapter to be trained, by UNet.
_adapted: WeakKeyDictionary[nn.Module, list[dict[str, Any]]] = WeakKeyDictionary()
# What its layers compute with, by UNet.
_shared: WeakKeyDictionary[nn.Module, list[_Shared]] = WeakKeyDictionary()

ADAPTER = "lcm"

# LCM-LoRA's own choice (method of arXiv 2311.05556): attention, feed-forward, and every convolution of the resnets.
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


def inject(unet: nn.Module, rank: int, alpha: float, seed: int) -> dict[str, nn.Parameter]:
    """Adds fp32 LoRA layers to a frozen UNet and returns their parameters by name, in a fixed order.

    The base's weights keep their precision and storage; B is zero, so the model's output is unchanged. Only the
    returned parameters require gradients.
    """
    from peft import LoraConfig, inject_adapter_in_model

    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=True)
        inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    _adapted[unet] = [vars(layer) for _, layer in _layers(unet)]
    parameters = {name: p for name, p in unet.named_parameters() if f".{ADAPTER}." in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()  # bf16 LoRA loses small updates
        parameter.requires_grad_(True)
    return parameters


@contextmanager
def disabled(unet: nn.Module) -> Iterator[None]:
    """Within the block the UNet is the base alone. Backward passes must not cross its border."""
    # Past nn.Module's __setattr__ and without walking through all modules, which takes SDXL's host 23 ms in each step.
    layers = _adapted.get(unet) or [vars(layer) for _, layer in _layers(unet)]
    for layer in layers:
        layer["_disable_adapters"] = True
    try:
        yield
    finally:
        for layer in layers:
            layer["_disable_adapters"] = False


def _layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def direct_forwards(unet: nn.Module, *, merged: bool | None = None) -> None:
    """Gives every adapted layer a forward of few kernels in the base's precision, with fp32 gradients to A and B.

    PEFT casts the input to fp32, multiplies there, scales apart and casts back. Here A and B are cast instead.

    Args:
        merged: one kernel over W + scale B A, by default where that takes fewer operations, but for half precision on
            a GPU, where the sum's rounding would keep most of an early adapter out.
    """
    shared: list[_Shared] = []
    for _, layer in _layers(unet):
        if _merging_pays(layer) if merged is None else merged:
            whole = _Sum(layer)
            layer.forward = _merged_forward(whole)
            shared.append(whole)
        else:
            copies = _Copies(layer)
            layer.forward = _beside_forward(copies)
            shared.append(copies)
    _shared[unet] = shared


def _merging_pays(layer: Any) -> bool:
    weight, inner = layer.base_layer.weight, layer.lora_A[ADAPTER].weight
    if weight.dtype != torch.float32 and weight.device.type != "cpu":
        return False
    # Of one position: the sum needs a product of W's size for its gradient; beside it, A and B need three of theirs.
    return 3 * (inner.numel() + layer.lora_B[ADAPTER].weight.numel()) > weight.numel()


class _Shared:
    """What a layer's passes compute with, made of A and B once for all passes that see the same A and B.

    These are leaves of autograd, and what gradient they get goes on to A and B. Whether A and B have changed is told by
    autograd's count of changes, which does not see what is done by way of `.data` or another view (see Optimization).
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.a, self.b = layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        self.scale: float = layer.scaling[ADAPTER]
        self.copies: list[tuple[Tensor, Tensor, float]] = []  # leaf, what it is a copy of, and times what
        self._of: tuple[int, int] | None = None  # the versions of A and B

    def stale(self) -> bool:
        return self._of != (self.a._version, self.b._version) and not self.layer._disable_adapters

    def make(self) -> None:
        """Makes what is not a copy."""
        self._of = self.a._version, self.b._version


class _Sum(_Shared):
    """W + scale B A, summed in fp32."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight = layer.base_layer.weight
        self.whole = torch.empty_like(self.weight, memory_format=torch.contiguous_format).requires_grad_()
        self.whole.register_post_accumulate_grad_hook(self._pass_on)
        self._views: tuple[Tensor, ...] = ()  # W, A, B and their sum as matrices, which autograd does not follow

    def make(self) -> None:
        if not self._views or self._views[1].data_ptr() != self.a.data_ptr():  # parameters move, to one buffer
            self._views = tuple(tensor.detach().flatten(1) for tensor in (self.weight, self.a, self.b, self.whole))
        weight, a, b, whole = self._views
        if weight.dtype == b.dtype:
            torch.addmm(weight, b, a, alpha=self.scale, out=whole)
        else:
            torch.add(weight, b @ a, alpha=self.scale, out=whole)
        super().make()

    def _pass_on(self, whole: Tensor) -> None:
        _, a, b, _ = self._views
        gradient = _taken(whole).flatten(1)
        _give(self.a, b.t() @ gradient, self.scale)
        _give(self.b, gradient @ a.t(), self.scale)


class _Copies(_Shared):
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
        leaf.register_post_accumulate_grad_hook(lambda leaf: _give(source, _taken(leaf), factor))
        return leaf


def _taken(leaf: Tensor) -> Tensor:
    """Returns the gradient of a leaf in fp32; the leaf then has none."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient.float()


def _give(parameter: Tensor, gradient: Tensor, factor: float) -> None:
    gradient = gradient.view_as(parameter)
    if factor != 1:
        gradient = gradient * factor
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def refresh(unet: nn.Module) -> None:
    """Brings what the UNet's layers compute with up to date with A and B. Once compiled they do not do so themselves;
    and all together take a GPU a few kernels, where one by one they take two each."""
    _refresh(_shared.get(unet, ()))


def _refresh(shared: Iterable[_Shared]) -> None:
    if not (stale := [each for each in shared if each.stale()]):
        return
    copies = [copy for each in stale for copy in each.copies]
    with torch.no_grad():
        for factor in {factor for *_, factor in copies}:
            leaves, sources = zip(*((leaf, source) for leaf, source, f in copies if f == factor), strict=True)
            torch._foreach_copy_(leaves, sources if factor == 1 else torch._foreach_mul(sources, factor))
        for each in stale:
            each.make()


def _merged_forward(whole: _Sum) -> Callable[[Tensor], Tensor]:
    layer, base = whole.layer, whole.layer.base_layer
    convolution = isinstance(base, nn.Conv2d)
    pointwise = convolution and base.kernel_size == base.stride == (1, 1) and base.groups == 1 and not any(base.padding)
    pointwise = pointwise and base.weight.device.type == "cpu"

    def forward(x: Tensor) -> Tensor:
        if layer._disable_adapters:
            return base(x)
        compiling = torch.compiler.is_compiling()
        if not compiling and whole.stale():
            _refresh((whole,))
        if not convolution:
            return nn.functional.linear(x, whole.whole, base.bias)
        if pointwise and not compiling:
            return _pointwise(x, whole.whole, base.bias)
        return base._conv_forward(x, whole.whole, base.bias)

    return forward


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of kernel 1 as products, which take a CPU half of the time: there is no turning of pictures into
    the layout of convolutions and back."""
    weight, pixels = weight.flatten(1).expand(len(x), -1, -1), x.flatten(2)
    product = torch.bmm(weight, pixels) if bias is None else torch.baddbmm(bias[:, None], weight, pixels)
    return product.unflatten(2, x.shape[2:])


def _beside_forward(copies: _Copies) -> Callable[[Tensor], Tensor]:
    layer, base = copies.layer, copies.layer.base_layer
    convolution = isinstance(base, nn.Conv2d)
    inner = layer.lora_A[ADAPTER]

    def forward(x: Tensor) -> Tensor:
        if layer._disable_adapters:
            return base(x)
        if not torch.compiler.is_compiling() and copies.stale():
            _refresh((copies,))
        if convolution:
            return base(x) + nn.functional.conv2d(inner._conv_forward(x, copies.down, None), copies.up)
        alone, low = base(x), nn.functional.linear(x, copies.down)
        return torch.addmm(alone.flatten(0, -2), low.flatten(0, -2), copies.up.t()).view_as(alone)

    return forward


def adapted_layers(unet: nn.Module) -> int:
    """Returns how many layers of the UNet carry the adapter."""
    return sum(1 for _ in _layers(unet))


def parameters(unet: nn.Module) -> int:
    """Returns how many numbers the adapter has."""
    return sum(p.numel() for name, p in unet.named_parameters() if f".{ADAPTER}." in name)


def state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter in diffusers' key style with alpha / rank folded into B, fp32 on the CPU, sorted by name.

    Readers that know nothing of alpha then apply it at scale 1, which is what was trained; diffusers loses an alpha
    that differs from the rank on the way through a file.
    """
    tensors = {}
    for name, layer in _layers(unet):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        tensors[f"unet.{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = (b.detach().float().cpu() * layer.scaling[ADAPTER]).contiguous()
    return dict(sorted(tensors.items()))


def save_file(tensors: dict[str, Tensor], path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Writes the adapter; the same tensors and metadata give the same bytes. Scales (`.alpha`) keep their type."""
    stored = {name: t if name.endswith(".alpha") else t.to(dtype).contiguous() for name, t in tensors.items()}
    data = save(stored, metadata=metadata)
    atomic_write(path, lambda p: p.write_bytes(_with_sorted_header(data)))


def _with_sorted_header(data: bytes) -> bytes:
    """Returns the same safetensors file with its header sorted: the library writes metadata in a random order."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format's alignment
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def adapter_metadata(rank: int) -> dict[str, str]:
    """Returns the header from which diffusers rebuilds the LoRA configuration instead of guessing it."""
    settings = {"unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": TARGETS, "unet.peft_type": "LORA"}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}


def load(unet: nn.Module, path: Path) -> None:
    """Adds the adapter of a diffusers-format file to a bare UNet, active and frozen.

    Raises:
        UserError: the file cannot be read, or its tensors do not fit this UNet; the first that differs is named.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is not a readable safetensors file: {error}") from error
    tensors = {name.removeprefix("unet."): t for name, t in tensors.items()}
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    _check_names(unet, names, str(path))
    try:
        layers = {name: (tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")) for name in names}
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    if tensors:
        raise UserError(f"{path}: {len(tensors)} tensors do not fit this base, the first is {min(tensors)}")
    attach(unet, layers, str(path))


def attach(unet: nn.Module, layers: Layers, source: str) -> None:
    """Adds an adapter of scale 1 to a bare UNet, active, frozen and in fp32.

    Args:
        layers: A (r, in) and B (out, r), or of convolutions (r, in, kh, kw) and (out, r, 1, 1), by the module's name;
            ranks may differ.
        source: what messages call the adapter.

    Raises:
        UserError: a layer that this UNet does not have, or one of another size; the first is named.
    """
    from peft import LoraConfig, inject_adapter_in_model

    _check_layers(unet, layers, source)
    ranks = {name: down.shape[0] for name, (down, _) in layers.items()}
    most = max(ranks.values())
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most, lora_alpha=most, target_modules=sorted(layers), rank_pattern=others, alpha_pattern=others
    )
    inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    for name, layer in _layers(unet):
        for part, tensor in zip((layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]), layers[name], strict=True):
            part.weight.data = tensor.to(part.weight.device, torch.float32)
    unet.requires_grad_(False)


def put(unet: nn.Module, layers: Layers, source: str) -> Callable[[], None]:
    """Gives a bare UNet this adapter of scale 1, to draw with, and returns what takes it away again, to the bit.

    In fp32 it is summed into the weights, so that drawing costs what the base costs. In half precision, where a sum
    would round, it stays beside them.

    Args:
        layers, source: see `attach`.
    """
    if any(p.dtype != torch.float32 for p in unet.parameters()):
        attach(unet, layers, source)

        def detach() -> None:
            for name, layer in list(_layers(unet)):
                unet.set_submodule(name, layer.base_layer)

        return detach
    _check_layers(unet, layers, source)
    modules = dict(unet.named_modules())
    bare = {name: modules[name].weight.data for name in layers}
    for name, (down, up) in layers.items():
        weight = bare[name]
        down, up = (part.to(weight.device, torch.float32).flatten(1) for part in (down, up))
        modules[name].weight.data = weight + (up @ down).view_as(weight)

    def restore() -> None:
        for name, weight in bare.items():
            modules[name].weight.data = weight

    return restore


@contextmanager
def applied(unet: nn.Module, layers: Layers, source: str) -> Iterator[None]:
    """Within the block a bare UNet has this adapter of scale 1; see `put`."""
    take_away = put(unet, layers, source)
    try:
        yield
    finally:
        take_away()


def _check_layers(unet: nn.Module, layers: Layers, source: str) -> None:
    _check_names(unet, layers, source)
    modules = dict(unet.named_modules())
    for name, (down, up) in layers.items():
        outputs, inputs = modules[name].weight.shape[0], modules[name].weight.shape[1:]
        if up.shape[0] != outputs or down.shape[1:] != inputs or up.shape[1] != down.shape[0]:
            raise UserError(
                f"{source}: {name} is {tuple(down.shape)} and {tuple(up.shape)}, and this base's weight is "
                f"{tuple(modules[name].weight.shape)}: it was made for another base"
            )


def _check_names(unet: nn.Module, names: Iterable[str], source: str) -> None:
    modules = dict(unet.named_modules())
    for name in names:
        if name not in modules:
            raise UserError(f"{source}: holds {name}, which this base does not have: it was made for another base")
