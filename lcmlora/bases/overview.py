"""What the bases of params.yaml are and what an adapter of each would be, from their configurations alone."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from lcmlora import bases
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.io.terminal import cell


def rows(config: Config, root: Path = Path("bases")) -> list[dict[str, Any]]:
    """Returns one row for each base: a `bases.Description` with the adapter's `rank`, or `name`, `source` and `reason`.

    A base that cannot be described says why in its row, and the others are described all the same.
    """
    found = []
    for name, base in config.bases.items():
        settings = config.distill_for(name)
        try:
            described = bases.describe(name, base, root / name, settings.rank, settings.alpha)
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
