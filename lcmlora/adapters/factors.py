"""The tensors of an adapter's file, sorted into the factors of its layers and checked.

The faults of a file are reported in the order in which a person would ask: is it another model's adapter, does it have
more than a UNet's layers, is it another kind of adapter, and only then tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from lcmlora.adapters import spellings, tensorfile
from lcmlora.adapters.spellings import DOWN, UP
from lcmlora.errors import UserError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Part(NamedTuple):
    """A tensor with its name in the file."""

    name: str
    tensor: Tensor


# The parts of each layer (DOWN, UP, ALPHA), by the layer's name in the file's spelling.
Spelled = dict[str, dict[str, Part]]


def check_model(tensors: Collection[str], own: str | None, shown: str) -> None:
    """Raises UserError if the layers are known to be those of another model. Call it before every other check.

    Args:
        own: the result of `spellings.foreign_model` for the base's layers.
        shown: the file's name in errors.
    """
    lora_names = [name for name in tensors if "lora" in name and not spellings.of_text_encoder(name)]
    if (model := spellings.foreign_model(lora_names)) and model != own:
        first = min(name for name in lora_names if spellings.foreign_model([name]))
        raise UserError(
            f"{shown}: its layers are those of {model}, and other models than Stable Diffusion 1, 2 and XL are not "
            f"supported; the first is {spellings.shown(first)}"
        )


def check_others(tensors: Collection[str], unet_only: bool, shown: str) -> set[str]:
    """Returns the names of the tensors that are not the UNet's. Raises UserError unless these may be left out.

    Args:
        unet_only: they may be left out.
        shown: the file's name in errors.
    """
    text = [name for name in tensors if spellings.of_text_encoder(name)]
    tokens = [name for name in tensors if spellings.is_embedding(name)]
    if text and len(text) == len(tensors):
        raise UserError(f"{shown}: holds no tensor of a UNet adapter, only a text encoder's")
    for names, kind in ((text, "for a text encoder"), (tokens, "embeddings of trained tokens")):
        if names and not unet_only:
            raise UserError(
                f"{shown}: {len(names)} of {len(tensors)} tensors are {kind}, the first is "
                f"{spellings.shown(min(names))}; only the UNet's are supported: convert it with --unet-only to leave "
                "the others out, which weakens it"
            )
    return {*text, *tokens}


def by_layer(tensors: dict[str, Tensor], shown: str) -> Spelled:
    """Returns the parts of each layer. Raises UserError if a tensor is not a plain LoRA's, or if two tensors are
    the same factor of one layer."""
    spelled: Spelled = {}
    for name, tensor in sorted(tensors.items()):
        parsed = spellings.parse(name)
        if parsed is None:
            raise UserError(
                f"{shown}: {spellings.shown(name)} is not a tensor of a plain LoRA of Stable Diffusion: "
                f"{spellings.explain(name, tensors)}"
            )
        parts = spelled.setdefault(parsed.layer, {})
        if parsed.part in parts:
            raise UserError(f"{shown}: {name} is there a second time, as {parts[parsed.part].name}")
        parts[parsed.part] = Part(name, tensor)
    if not spelled:
        raise UserError(f"{shown}: holds no tensor of a UNet adapter")
    return spelled


def check_factors(spelled: Spelled, shown: str) -> None:
    """Raises UserError if A and B of a layer are not two finite matrices, or convolutions, of one product."""
    for layer, parts in spelled.items():
        for part in (DOWN, UP):
            if part not in parts:
                raise UserError(f"{shown}: {layer} has {' and '.join(sorted(parts))}, and {part} is missing")
            name, tensor = parts[part]
            if tensor.dtype not in _DTYPES:
                raise UserError(f"{shown}: {name} has weights in {tensor.dtype}, expected float32, float16 or bfloat16")
            if tensor.ndim not in (2, 4) or not tensor.numel():
                expected = "matrix or a convolution" if tensor.numel() else "rank of 1 or more: it has no values"
                raise UserError(f"{shown}: {name} is {tuple(tensor.shape)}, expected a {expected}")
        down, up = tuple(parts[DOWN].tensor.shape), tuple(parts[UP].tensor.shape)
        if down[0] != up[1] or len(down) != len(up) or any(size != 1 for size in up[2:]):
            raise UserError(f"{shown}: the factors of {layer} do not fit each other: {down} and {up}; it is damaged")
        for part in (DOWN, UP):
            tensorfile.check_finite(parts[part].tensor, parts[part].name, shown)


def alpha_of(part: Part, shown: str) -> float:
    """Returns the value of an ALPHA part. Raises UserError if it is not one finite number above 0."""
    name, tensor = part
    if tensor.numel() != 1:
        raise UserError(f"{shown}: {name} has {tensor.numel()} values, expected one number for the layer")
    value = 0.0 if tensor.is_complex() else float(tensor.float())  # in fp32, as other programs read it
    if not (math.isfinite(value) and value > 0):
        # ComfyUI takes 0 for no effect, and kohya's trainer for the rank.
        raise UserError(f"{shown}: {name} is {tensor.item():g}, expected a finite number above 0")
    return value
