"""Warns of pictures that are enlarged because a base draws larger ones: training on them teaches blur."""

from __future__ import annotations

import sys
from pathlib import Path

from lcmlora.config import Data
from lcmlora.data.sources.source import iter_records
from lcmlora.plugins import SOURCES

_MIN_FACTOR = 1.5  # less enlargement is hardly visible


def enlargement_warning(data: Data, base: str, resolution: int, pictures: Path) -> str:
    """Returns a line on the pictures in this folder's train.jsonl whose shorter side is enlarged 1.5 times or more;
    empty if there are none."""
    if not SOURCES.get(data.source).has_sizes:
        return ""
    count = far = 0
    most = 0.0
    for record in iter_records(pictures / "train.jsonl"):
        factor = resolution / min(record.width, record.height)
        count += 1
        far += factor >= _MIN_FACTOR
        most = max(most, factor)
    if not far:
        return ""
    return (
        f"{far} of {count} pictures are enlarged for {base} up to {most:.3g} times: their shorter side "
        f"is far below its {resolution} pixels; data.min_side: {resolution} drops them (it is {data.min_side})"
    )


def warn(data: Data, base: str, resolution: int, pictures: Path) -> None:
    """Prints the line of `enlargement_warning` to standard error, if there is one."""
    if line := enlargement_warning(data, base, resolution, pictures):
        print(f"warning: {line}", file=sys.stderr)
