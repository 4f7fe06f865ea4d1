"""A base with a style's LoRA summed into its UNet, for distillations of the styled model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from lcmlora.adapters import formats, lora, tensorfile
from lcmlora.bases import architecture
from lcmlora.bases.base import load, write
from lcmlora.bases.examination.examine import examine
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, sha256_file

MARKER = ".styled"  # in the folder: what it was made from


def weights_of(name: str, base: Base, sources: Path = Path()) -> Path:
    """Returns the file of the style's LoRA, relative to `sources`. Raises UserError where there is none."""
    assert base.style is not None
    path = sources / base.style.source
    path = tensorfile.find(path) if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"bases.{name}.style.source: {path}: no such file; expected a LoRA, or the folder of one")
    return path


def make(name: str, base: Base, plain: Path, target: Path, sources: Path = Path()) -> None:
    """Makes `target` the base in the folder `plain` with the style of `base.style`, in the precision of its file.

    Idempotent: a marker in the folder holds what it was made from. An interrupted call leaves no `target`.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: no LoRA, one for another base or with text encoders, or a folder in the way that was not made here.
    """
    assert base.style is not None
    weights = weights_of(name, base, sources)
    digest = examine(name, plain, base.variant).digest
    made_from = {"base": digest, "style": sha256_file(weights), "weight": base.style.weight}
    wanted = json.dumps(made_from, sort_keys=True) + "\n"
    marker = target / MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return
    if target.exists() and not target.is_symlink() and not marker.is_file():
        raise UserError(f"{target} is in the way of {plain} with the style {weights}; move it or rename the base")
    style = formats.read(weights, architecture.of_folder(plain))
    loaded = load(name, base, plain, device=torch.device("cpu"), parts=("network",))
    factors = {name: (layer.down, base.style.weight * layer.folded.up.float()) for name, layer in style.layers.items()}
    lora.put(loaded.network, factors, str(weights))
    loaded.network.to(_dtype(plain / loaded.family.network.folder))
    with atomic_folder(target) as folder:
        write(loaded, folder)
        (folder / MARKER).write_text(wanted, encoding="utf-8")
        if target.is_symlink():  # the base was a folder before
            target.unlink()


def _dtype(part: Path) -> torch.dtype:
    """Returns the precision of a part's file."""
    path = min(part.glob("*.safetensors"))
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(next(iter(file.keys())))
    return tensor.dtype
