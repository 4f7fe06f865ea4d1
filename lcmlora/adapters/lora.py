"""The adapter's layers in a network: injected, collected, saved in diffusers' format, loaded, and applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lcmlora.adapters.metadata import WEIGHTS as WEIGHTS
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write
from lcmlora.patches.peft_internals import set_adapters_off

Layers = dict[str, tuple[Tensor, Tensor]]  # A and B by the module's name

# The attributes of the layers of an adapter that is trained, by UNet.
_adapted: WeakKeyDictionary[nn.Module, list[dict[str, object]]] = WeakKeyDictionary()

ADAPTER = "lcm"

# The layers that LCM-LoRA adapts (arXiv 2311.05556): attention, feed-forward, and every convolution of the resnets.
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


@dataclass(frozen=True)
class Placement:
    """The layers of a network that an adapter changes, and their names in its file.

    targets: the ends of the layers' names, or a regular expression for whole names.
    prefix: the prefix of the names in diffusers' files, which is the name of the network's folder in the base's.
    """

    targets: list[str] | str
    prefix: str


UNET = Placement(TARGETS, "unet")


def inject(unet: nn.Module, rank: int, alpha: float, seed: int, placement: Placement = UNET) -> dict[str, nn.Parameter]:
    """Adds fp32 LoRA layers to a frozen UNet and returns their parameters by name, in a fixed order.

    The base's weights keep their precision and storage; B is zero, so the model's output is unchanged. Only the
    returned parameters require gradients.

    Args:
        seed: of the random numbers in A.
    """
    from peft import LoraConfig, inject_adapter_in_model

    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=placement.targets, init_lora_weights=True)
        inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    _adapted[unet] = [vars(layer) for _, layer in _layers(unet)]
    parameters = {name: p for name, p in unet.named_parameters() if f".{ADAPTER}." in name}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()  # bf16 LoRA loses small updates
        parameter.requires_grad_(True)
    return parameters


@torch.no_grad()
def fill(unet: nn.Module, layers: Layers, source: str) -> None:
    """Gives the layers that `inject` added the values of an adapter of scale 1.

    Args:
        layers: see `attach`.
        source: the adapter's name in errors.

    Raises:
        UserError: it has other layers, or another rank.
    """
    own = dict(_layers(unet))
    if own.keys() != layers.keys():
        other = min(own.keys() ^ layers.keys())
        raise UserError(f"{source}: {'lacks' if other in own else 'has'} {other}, and training starts from all layers")
    for name, layer in own.items():
        for part, value in zip((layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]), layers[name], strict=True):
            if part.weight.shape != value.shape:
                raise UserError(f"{source}: {name} is {tuple(value.shape)}, expected {tuple(part.weight.shape)}")
            part.weight.copy_(value)
        layer.lora_B[ADAPTER].weight.div_(layer.scaling[ADAPTER])


@contextmanager
def disabled(unet: nn.Module) -> Iterator[None]:
    """Within the block the UNet computes without its adapter. No backward pass may begin before it and end in it."""
    # The layers are kept in a table: for SDXL, finding them among all modules takes longer than switching them.
    layers = _adapted.get(unet) or [vars(layer) for _, layer in _layers(unet)]
    if not layers or layers[0].get("_disable_adapters"):  # within such a block, which ends later
        yield
        return
    set_adapters_off(layers, True)
    try:
        yield
    finally:
        set_adapters_off(layers, False)


def _layers(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def adapted_layers(unet: nn.Module) -> int:
    """Returns the number of layers of the UNet that have an adapter."""
    return sum(1 for _ in _layers(unet))


def parameters(unet: nn.Module) -> int:
    """Returns the number of the adapter's parameters."""
    return sum(p.numel() for name, p in unet.named_parameters() if f".{ADAPTER}." in name)


def state_dict(unet: nn.Module, placement: Placement = UNET) -> dict[str, Tensor]:
    """Returns the adapter's tensors by diffusers' names, with alpha / rank folded into B, fp32 on the CPU, sorted.

    Programs that ignore alpha then apply the adapter at scale 1, as it was trained. Diffusers itself loses an alpha
    that differs from the rank when it saves and loads a file.
    """
    tensors = {}
    for name, layer in _layers(unet):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        tensors[f"{placement.prefix}.{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        tensors[f"{placement.prefix}.{name}.lora_B.weight"] = (
            b.detach().float().cpu() * layer.scaling[ADAPTER]
        ).contiguous()
    return dict(sorted(tensors.items()))


def save_file(tensors: dict[str, Tensor], path: Path, *, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Writes the adapter in `dtype`, except `.alpha` tensors. The same tensors and metadata give the same bytes."""
    stored = {name: t if name.endswith(".alpha") else t.to(dtype).contiguous() for name, t in tensors.items()}
    data = save(stored, metadata=metadata)
    atomic_write(path, lambda p: p.write_bytes(_with_sorted_header(data)))


def _with_sorted_header(data: bytes) -> bytes:
    """Returns the same safetensors file with a sorted header. The library writes metadata in a random order."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format's alignment
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def adapter_metadata(rank: int, placement: Placement = UNET) -> dict[str, str]:
    """Returns the header of an adapter's file, from which diffusers reads the LoRA configuration."""
    config = {"r": rank, "lora_alpha": rank, "target_modules": placement.targets, "peft_type": "LORA"}
    settings = {f"{placement.prefix}.{key}": value for key, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}


def load(unet: nn.Module, path: Path, placement: Placement = UNET) -> None:
    """Adds the adapter of a diffusers-format file to a bare UNet, active and frozen.

    Raises:
        UserError: the file cannot be read, or a tensor does not fit this UNet; the error names the first.
    """
    attach(unet, read(unet, path, placement), str(path))


def read(unet: nn.Module, path: Path, placement: Placement = UNET) -> Layers:
    """Returns the layers in a diffusers-format file of an adapter for this UNet.

    Raises:
        UserError: the file cannot be read, or a tensor does not fit this UNet; the error names the first.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is not a readable safetensors file: {error}") from error
    tensors = {name.removeprefix(f"{placement.prefix}."): t for name, t in tensors.items()}
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    _check_names(unet, names, str(path))
    try:
        layers = {name: (tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")) for name in names}
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    if tensors:
        raise UserError(f"{path}: {len(tensors)} tensors do not fit this base, the first is {min(tensors)}")
    return layers


def attach(unet: nn.Module, layers: Layers, source: str) -> None:
    """Adds an adapter of scale 1 to a bare UNet, active, frozen and in fp32.

    Args:
        layers: A (r, in) and B (out, r), or for convolutions (r, in, kh, kw) and (out, r, 1, 1), by the module's name;
            ranks may differ.
        source: the adapter's name in errors.

    Raises:
        UserError: the UNet lacks a layer, or has it in another size; the error names the first.
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


def apply(unet: nn.Module, layers: Layers, source: str) -> Callable[[], None]:
    """Applies an adapter of scale 1 to a bare UNet for drawing, and returns the function that undoes this, to the bit.

    In fp32 the adapter is summed into the weights, so that drawing costs no more than with the base. In half precision,
    where the sum would be rounded, it stays beside them, see `attach`.

    Args:
        layers, source: see `attach`.

    Raises:
        UserError: as `attach`.
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
    """Within the block an adapter of scale 1 is applied to a bare UNet; see `apply`."""
    undo = apply(unet, layers, source)
    try:
        yield
    finally:
        undo()


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
