"""The layers of a base that an adapter may change, by the base's configurations alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lcmlora.adapters import layer_names
from lcmlora.adapters.layer_names import Architecture
from lcmlora.bases import families
from lcmlora.bases.description import network_config
from lcmlora.bases.examination.structure import check_class
from lcmlora.bases.examination.weightfiles import json_of
from lcmlora.bases.families.family import Family
from lcmlora.config import Base
from lcmlora.errors import UserError


def of_folder(folder: Path) -> Architecture:
    """Returns the architecture of the diffusers base in `folder`, which needs no weights there.

    Raises:
        UserError: the network's config.json is missing or is not that of a network of a known family.
    """
    family, config = _network(folder)
    path = folder / family.network.folder / "config.json"
    if config is None:
        raise UserError(f"{path}: no such file; expected the folder of a diffusers base")
    vae = _read(folder / family.vae.folder / "config.json") or {}
    scheduler = _read(folder / "scheduler" / "scheduler_config.json") or {}
    check_class(path, config, family.network.classes[0])
    try:
        return _architecture(family, config, family.native_resolution(config, vae), scheduler.get("prediction_type"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def of_base(base: Base, folder: Path, sources: Path = Path()) -> Architecture:
    """Returns the architecture of a base of params.yaml, which need not be fetched where it is a published one.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: see `of_folder` and `description.network_config`.
    """
    if _network(folder)[1] is not None:
        return replace(of_folder(folder), resolution=base.resolution)
    config = network_config(base, folder, sources)
    family = families.of_network(config)
    check_class(folder / family.network.folder / "config.json", config, family.network.classes[0])
    return _architecture(family, config, base.resolution, None)


def _network(folder: Path) -> tuple[Family, dict[str, Any] | None]:
    """Returns the family of the network in a base's folder, and its configuration where there is one."""
    first = families.by_name(families.COMMONEST)
    for family in families.known():
        config = _read(folder / family.network.folder / "config.json")
        if config is not None and family.recognises(config):
            return family, config
    return first, _read(folder / first.network.folder / "config.json")


def _architecture(
    family: Family, config: dict[str, Any], resolution: int | None, prediction_type: str | None
) -> Architecture:
    import torch

    with torch.device("meta"):
        try:
            network = family.build(config)
        except Exception as error:  # of a foreign configuration, whatever it leads to
            raise UserError(f"diffusers cannot build a UNet from its configuration: {error}") from error
    return layer_names.of_network(
        network,
        naming=family.naming(config),
        prefix=family.placement.prefix,
        resolution=resolution,
        prediction_type=prediction_type,
    )


def _read(path: Path) -> dict[str, Any] | None:
    return json_of(path) if path.is_file() else None
