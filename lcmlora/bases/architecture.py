"""The layers that an adapter may change, by a base's configurations alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lcmlora.adapters import layer_names
from lcmlora.adapters.layer_names import Architecture
from lcmlora.bases import families
from lcmlora.bases.description import network_config
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.bases.examination.structure import check_class
from lcmlora.bases.families.family import Family
from lcmlora.config import Base
from lcmlora.errors import UserError


def of_folder(folder: Path) -> Architecture:
    """Returns the architecture of the diffusers base in `folder`. Its weights need not be there.

    Raises:
        UserError: the network's config.json is missing, or no network of a known family can be built from it.
    """
    family, config = _network(folder)
    if config is None:
        path = folder / family.network.folder / "config.json"
        raise UserError(f"{path}: no such file; expected the folder of a diffusers base")
    vae = _read(folder / family.vae.folder / "config.json") or LibraryConfig({}, "an unknown VAE")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    prediction_type = None if scheduler is None else scheduler.text("prediction_type")
    check_class(config, family.network.classes[0])
    return _architecture(family, config, family.native_resolution(config, vae), prediction_type)


def of_base(base: Base, folder: Path, sources: Path = Path()) -> Architecture:
    """Returns the architecture of a base of params.yaml. A published base need not be fetched for it.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: see `of_folder` and `description.network_config`.
    """
    if _network(folder)[1] is not None:
        return replace(of_folder(folder), resolution=base.resolution)
    config = network_config(base, folder, sources)
    family = families.of_network(config)
    check_class(config, family.network.classes[0])
    return _architecture(family, config, base.resolution, None)


def _network(folder: Path) -> tuple[Family, LibraryConfig | None]:
    """Returns the family of the network in a base's folder, and its configuration, if the folder has one."""
    for family in families.known():
        config = _read(folder / family.network.folder / "config.json")
        if config is not None and family.recognises(config):
            return family, config
    default = families.by_name(families.DEFAULT_FAMILY)
    return default, _read(folder / default.network.folder / "config.json")


def _architecture(
    family: Family, config: LibraryConfig, resolution: int | None, prediction_type: str | None
) -> Architecture:
    import torch

    with torch.device("meta"):
        try:
            network = family.build(config)
        except Exception as error:  # of a foreign configuration, whatever it leads to
            raise UserError(f"{config.place}: diffusers cannot build a UNet from it: {error}") from error
    return layer_names.of_network(
        network,
        naming=family.naming(config),
        prefix=family.placement.prefix,
        resolution=resolution,
        prediction_type=prediction_type,
    )


def _read(path: Path) -> LibraryConfig | None:
    return LibraryConfig.read(path) if path.is_file() else None
