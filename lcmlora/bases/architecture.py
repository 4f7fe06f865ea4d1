"""The layers of a base that an adapter may change, by the base's configurations alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lcmlora.adapters import layer_names
from lcmlora.adapters.layer_names import Architecture
from lcmlora.bases.description import unet_config
from lcmlora.bases.examination.structure import check_class
from lcmlora.bases.examination.weightfiles import json_of
from lcmlora.config import Base
from lcmlora.errors import UserError


def of_folder(folder: Path) -> Architecture:
    """Returns the architecture of the diffusers base in `folder`, which needs no weights there.

    Raises:
        UserError: unet/config.json is missing or is not that of a UNet.
    """
    path = folder / "unet" / "config.json"
    config = _read(path)
    if config is None:
        raise UserError(f"{path}: no such file; expected the folder of a diffusers base")
    vae = _read(folder / "vae" / "config.json") or {}
    scheduler = _read(folder / "scheduler" / "scheduler_config.json") or {}
    blocks = vae.get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and 1 <= len(blocks) <= 16 else 8
    size = config.get("sample_size")
    check_class(path, config, "UNet2DConditionModel")
    try:
        return layer_names.describe(
            config,
            resolution=size * factor if isinstance(size, int) else None,
            prediction_type=scheduler.get("prediction_type"),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def of_base(base: Base, folder: Path, sources: Path = Path()) -> Architecture:
    """Returns the architecture of a base of params.yaml, which need not be fetched where it is a published one.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: see `of_folder` and `description.unet_config`.
    """
    if (folder / "unet" / "config.json").is_file():
        return replace(of_folder(folder), resolution=base.resolution)
    config = unet_config(base, folder, sources)
    check_class(folder / "unet" / "config.json", config, "UNet2DConditionModel")
    return layer_names.describe(config, resolution=base.resolution)


def _read(path: Path) -> dict[str, Any] | None:
    return json_of(path) if path.is_file() else None
