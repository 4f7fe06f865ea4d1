"""A base with a style's LoRA summed into its UNet, to be distilled as one model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from lcmlora.adapters import formats, lora, tensorfile
from lcmlora.bases import architecture
from lcmlora.bases.base import load, save_base
from lcmlora.bases.examination.examine import examine_base
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, sha256_file

MARKER = ".styled"  # the file in the folder with the digests of what it was made from


def weights_of(name: str, base: Base, sources: Path = Path()) -> Path:
    """Returns the file of the style's LoRA, relative to `sources`. Raises UserError if there is none."""
    assert base.style is not None
    path = sources / base.style.source
    path = tensorfile.find(path) if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"bases.{name}.style.source: {path}: no such file; expected a LoRA, or the folder of one")
    return path


def make_styled_base(name: str, base: Base, plain: Path, target: Path, sources: Path = Path()) -> None:
    """Makes `target` the base in the folder `plain` with the style of `base.style`, in the precision of its UNet.

    Idempotent: a marker in the folder has the digests of base and style. An interrupted call leaves no `target`.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: the style is no LoRA, or one for another base or with text encoders; or `target` is a folder without
            the marker.
    """
    assert base.style is not None
    weights = weights_of(name, base, sources)
    digest = examine_base(name, plain, base.variant).digest
    made_from = {"base": digest, "style": sha256_file(weights), "weight": base.style.weight}
    content = json.dumps(made_from, sort_keys=True) + "\n"
    marker = target / MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == content:
        return
    if target.exists() and not target.is_symlink() and not marker.is_file():
        raise UserError(f"{target} is in the way of {plain} with the style {weights}; move it or rename the base")
    style = formats.read(weights, architecture.of_folder(plain))
    loaded = load(name, base, plain, device=torch.device("cpu"), parts=("network",))
    factors = {name: (layer.down, base.style.weight * layer.folded.up.float()) for name, layer in style.layers.items()}
    lora.apply(loaded.network, factors, str(weights))
    loaded.network.to(_stored_dtype(plain / loaded.family.network.folder))
    with atomic_folder(target) as folder:
        save_base(loaded, folder)
        (folder / MARKER).write_text(content, encoding="utf-8")
        if target.is_symlink():  # the base was a linked folder before
            target.unlink()


def _stored_dtype(part: Path) -> torch.dtype:
    """Returns the precision of a part's file."""
    path = min(part.glob("*.safetensors"))
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(next(iter(file.keys())))
    return tensor.dtype
