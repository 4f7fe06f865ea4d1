"""The factors of an adapter's layers, as a file has them: whose they are, what they are called, and whether they fit.

What is wrong with a file is told in the order in which a person would ask: is it another model's, does it hold more
than a UNet's layers, is it another kind of adapter, and then tensor by tensor.
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


Spelled = dict[str, dict[str, Part]]  # the parts of each layer, by its name as it is spelled


def check_model(tensors: Collection[str], own: str | None, shown: str) -> None:
    """Raises UserError if the layers are known to be those of another model. Call it before every other check.

    Args:
        own: what `spellings.family` returns for the base's layers.
    """
    lora_like = [name for name in tensors if "lora" in name and not spellings.of_text_encoder(name)]
    if (model := spellings.family(lora_like)) and model != own:
        first = min(name for name in lora_like if spellings.family([name]))
        raise UserError(
            f"{shown}: its layers are those of {model}, and other models than Stable Diffusion 1, 2 and XL are not "
            f"supported; the first is {spellings.shown(first)}"
        )


def others(tensors: Collection[str], unet_only: bool, shown: str) -> set[str]:
    """Returns the tensors that are not the UNet's and may be left out. Raises UserError where they must not be."""
    text = [name for name in tensors if spellings.of_text_encoder(name)]
    tokens = [name for name in tensors if spellings.is_embedding(name)]
    if text and len(text) == len(tensors):
        raise UserError(f"{shown}: holds no tensor of a UNet adapter, only a text encoder's")
    for found, what in ((text, "for a text encoder"), (tokens, "embeddings of trained tokens")):
        if found and not unet_only:
            raise UserError(
                f"{shown}: {len(found)} of {len(tensors)} tensors are {what}, the first is "
                f"{spellings.shown(min(found))}; only the UNet's are supported: convert it with --unet-only to leave "
                "the others out, which weakens it"
            )
    return {*text, *tokens}


def by_layer(tensors: dict[str, Tensor], shown: str) -> Spelled:
    """Returns the parts of each layer. Raises UserError for what is not of a plain LoRA, or there twice."""
    spelled: Spelled = {}
    for name, tensor in sorted(tensors.items()):
        found = spellings.parse(name)
        if found is None:
            raise UserError(
                f"{shown}: {spellings.shown(name)} is not a tensor of a plain LoRA of Stable Diffusion: "
                f"{spellings.foreign(name, tensors)}"
            )
        parts = spelled.setdefault(found.layer, {})
        if found.part in parts:
            raise UserError(f"{shown}: {name} is there a second time, as {parts[found.part].name}")
        parts[found.part] = Part(name, tensor)
    if not spelled:
        raise UserError(f"{shown}: holds no tensor of a UNet adapter")
    return spelled


def check(spelled: Spelled, shown: str) -> None:
    """Raises UserError where A and B of a layer are not two finite factors of one product."""
    for layer, parts in spelled.items():
        for part in (DOWN, UP):
            if part not in parts:
                raise UserError(f"{shown}: {layer} has {' and '.join(sorted(parts))}, and {part} is missing")
            name, tensor = parts[part]
            if tensor.dtype not in _DTYPES:
                raise UserError(f"{shown}: {name} has weights in {tensor.dtype}, expected float32, float16 or bfloat16")
            if tensor.ndim not in (2, 4) or not tensor.numel():
                what = "matrix or a convolution" if tensor.numel() else "rank of 1 or more: it has no values"
                raise UserError(f"{shown}: {name} is {tuple(tensor.shape)}, expected a {what}")
        down, up = tuple(parts[DOWN].tensor.shape), tuple(parts[UP].tensor.shape)
        if down[0] != up[1] or len(down) != len(up) or any(size != 1 for size in up[2:]):
            raise UserError(f"{shown}: the factors of {layer} do not fit each other: {down} and {up}; it is damaged")
        for part in (DOWN, UP):
            tensorfile.check_finite(parts[part].tensor, parts[part].name, shown)


def number(part: Part, shown: str) -> float:
    """Returns alpha. Raises UserError where it is not one number above 0."""
    name, tensor = part
    if tensor.numel() != 1:
        raise UserError(f"{shown}: {name} has {tensor.numel()} values, expected one number for the layer")
    value = 0.0 if tensor.is_complex() else float(tensor.float())  # as programs keep it
    if not (math.isfinite(value) and value > 0):
        # 0 is no effect to ComfyUI, and "alpha is the rank" to kohya's trainer.
        raise UserError(f"{shown}: {name} is {tensor.item():g}, expected a finite number above 0")
    return value
