"""What the bases of params.yaml are and what an adapter of each would be, from their configurations alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lcmlora.bases.examination.weightfiles import json_of
from lcmlora.config import Base, Config
from lcmlora.errors import UserError
from lcmlora.io.terminal import cell
from lcmlora.project import Project


def network_config(base: Base, folder: Path, sources: Path = Path()) -> dict[str, Any]:
    """Returns the configuration of the base's network, without its weights.

    It is that of the base at `folder`, else that of a local source (or of the `config` that a single file goes with),
    else the one that comes with this package for the published bases, which holds what differs from diffusers'
    defaults.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: there is none of these, or a file that is not JSON.
    """
    found = [_local_json(base, folder, sources, f"{part}/config.json") for part in _network_folders()]
    if config := next((config for config in found if config is not None), None):
        return config
    packaged = json.loads(resources.files("lcmlora").joinpath("architectures.json").read_text(encoding="utf-8"))
    for hub_id in (base.source, base.config):
        if hub_id in packaged:
            return dict(packaged[hub_id])
    raise UserError(
        f"{folder}/unet/config.json: no such file, and the architecture of {base.source} does not come with lcmlora; "
        f"run `lcmlora fetch {folder.name}`"
    )


def _local_json(base: Base, folder: Path, sources: Path, file: str) -> dict[str, Any] | None:
    places = [folder, sources / base.source, *([sources / base.config] if base.config else [])]
    path = next((place / file for place in places if (place / file).is_file()), None)
    return None if path is None else json_of(path)


def _network_folders() -> list[str]:
    from lcmlora.bases import families  # which needs torch, and `from lcmlora.bases import describe` does not

    return list(dict.fromkeys(family.network.folder for family in families.known()))


@dataclass(frozen=True)
class Description:
    """A base by its configuration alone."""

    name: str
    source: str
    resolution: int  # pixels
    unet_parameters: int
    lora_parameters: int
    adapted_layers: int
    prediction_type: str | None  # None where no scheduler configuration is at hand


def describe(name: str, base: Base, folder: Path, rank: int, alpha: float, sources: Path = Path()) -> Description:
    """Counts the network of a base and an adapter of this rank on it, on torch's meta device: no weights, no memory.

    Raises:
        UserError: the network's configuration is not at hand, or diffusers cannot build a network from it.
    """
    import torch

    from lcmlora.adapters import lora
    from lcmlora.bases import families

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    scheduler = _local_json(base, folder, sources, "scheduler/scheduler_config.json") or {}
    config = network_config(base, folder, sources)
    family = families.of_network(config)
    with torch.device("meta"):
        try:
            family.check_network(folder / family.network.folder / "config.json", config)
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
        prediction_type=scheduler.get("prediction_type"),
    )


def rows(config: Config, project: Project) -> list[dict[str, Any]]:
    """Returns one row for each base: a `Description` with the adapter's `rank`, or `name`, `source` and `reason`.

    A base that cannot be described says why in its row, and the others are described all the same.
    """
    found = []
    for name, base in config.bases.items():
        try:
            settings = config.distill_for(name)
            described = describe(name, base, project.base(name), settings.rank, settings.alpha, project.root)
            found.append(dataclasses.asdict(described) | {"rank": settings.rank})
        except UserError as error:
            found.append({"name": name, "source": base.source, "reason": str(error)})
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints what `rows` returns, for a person to read; a reason stands under the source it is about."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("base", no_wrap=True)
    table.add_column("source", overflow="fold")
    for title in ("pixels", "UNet", "LoRA (layers)", "rank"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("predicts", no_wrap=True)
    for row in rows:
        if "reason" in row:
            table.add_row(row["name"], cell(f"{row['source']}\n{row['reason']}"))
            continue
        table.add_row(
            row["name"],
            cell(row["source"]),
            str(row["resolution"]),
            f"{row['unet_parameters']:,}",
            f"{row['lora_parameters']:,} ({row['adapted_layers']})",
            str(row["rank"]),
            cell(row["prediction_type"] or ""),
        )
    # A file or a pipe has no width, and rich would take it for 80 columns, which fold a source.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
