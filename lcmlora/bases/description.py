"""A base's description, and the size of an adapter for it, from its configuration alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcmlora.adapters import layer_names
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.config import Base, Config
from lcmlora.errors import UserError
from lcmlora.io.terminal import cell
from lcmlora.project import Project


def network_config(base: Base, folder: Path, sources: Path = Path()) -> LibraryConfig:
    """Returns the configuration of the base's network. Its weights need not be there.

    The configuration is that of the base at `folder`; else that of a local source, or of the `config` of a single file;
    else, for a published base, the one in lcmlora/architectures.json, without diffusers' defaults.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: there is none of these, or the file is not JSON.
    """
    for part in _network_folders():
        if config := _local_config(base, folder, sources, f"{part}/config.json"):
            return config
    published = layer_names.published_configs()
    for hub_id in (base.source, base.config):
        if hub_id in published:
            return LibraryConfig(published[hub_id], f"lcmlora/architectures.json: {hub_id}")
    raise UserError(
        f"{folder}/unet/config.json: no such file, and the architecture of {base.source} does not come with lcmlora; "
        f"run `lcmlora fetch {folder.name}`"
    )


def _local_config(base: Base, folder: Path, sources: Path, file: str) -> LibraryConfig | None:
    folders = [folder, sources / base.source, *([sources / base.config] if base.config else [])]
    path = next((each / file for each in folders if (each / file).is_file()), None)
    return None if path is None else LibraryConfig.read(path)


def _network_folders() -> list[str]:
    from lcmlora.bases import families  # which needs torch, and `from lcmlora.bases import describe` does not

    return list(dict.fromkeys(family.network.folder for family in families.known()))


@dataclass(frozen=True)
class Description:
    """A base and an adapter for it."""

    name: str
    source: str
    resolution: int  # the pictures' side, in pixels
    unet_parameters: int
    lora_parameters: int
    adapted_layers: int
    prediction_type: str | None  # None if there is no scheduler configuration
    rank: int  # of the adapter


@dataclass(frozen=True)
class Undescribed:
    """A base that cannot be described."""

    name: str
    source: str
    reason: str


def describe(name: str, base: Base, folder: Path, rank: int, alpha: float, sources: Path = Path()) -> Description:
    """Counts the parameters of a base's network and of an adapter for it, on torch's meta device: without weights.

    Args:
        rank, alpha: of the adapter.
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: the network's configuration is missing, or diffusers cannot build a network from it.
    """
    import torch

    from lcmlora.adapters import lora
    from lcmlora.bases import families

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    scheduler = _local_config(base, folder, sources, "scheduler/scheduler_config.json")
    config = network_config(base, folder, sources)
    family = families.of_network(config)
    with torch.device("meta"):
        try:
            family.check_network(config)
            network = family.build(config)
        except UserError:
            raise
        except Exception as error:  # of a foreign configuration, whatever it leads to
            raise UserError(f"bases.{name}: diffusers cannot build a UNet from its configuration: {error}") from error
        parameters = sum(p.numel() for p in network.parameters())
        adapter = lora.inject(network, rank, alpha, seed=0, placement=family.placement)
    return Description(
        name=name,
        source=base.source,
        resolution=base.resolution,
        unet_parameters=parameters,
        lora_parameters=sum(p.numel() for p in adapter.values()),
        adapted_layers=lora.adapted_layers(network),
        prediction_type=None if scheduler is None else scheduler.text("prediction_type"),
        rank=rank,
    )


def describe_all(config: Config, project: Project) -> list[Description | Undescribed]:
    """Returns a description of every base of the settings, or the reason why it cannot be described."""
    described: list[Description | Undescribed] = []
    for name, base in config.bases.items():
        try:
            settings = config.distill_for(name)
            described.append(describe(name, base, project.base(name), settings.rank, settings.alpha, project.root))
        except UserError as error:
            described.append(Undescribed(name, base.source, str(error)))
    return described


def print_table(bases: Sequence[Description | Undescribed]) -> None:
    """Prints descriptions as a table, or the reason below the source of a base that has none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("base", no_wrap=True)
    table.add_column("source", overflow="fold")
    for title in ("pixels", "UNet", "LoRA (layers)", "rank"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("predicts", no_wrap=True)
    for base in bases:
        if isinstance(base, Undescribed):
            table.add_row(base.name, cell(f"{base.source}\n{base.reason}"))
            continue
        table.add_row(
            base.name,
            cell(base.source),
            str(base.resolution),
            f"{base.unet_parameters:,}",
            f"{base.lora_parameters:,} ({base.adapted_layers})",
            str(base.rank),
            cell(base.prediction_type or ""),
        )
    # A file or a pipe has no width; rich would assume 80 columns and fold the sources.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
