"""A look at a data set before anything is encoded: some of its pictures with their captions, on one sheet."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmlora.config import Data
from lcmlora.data import enlargement
from lcmlora.data.prepare import PARTS, prepare
from lcmlora.data.sources.source import Record, open_picture, read_records
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write, temporary_folder
from lcmlora.plugins import SOURCES

_COLUMNS = 4
_CELL = 2.4  # inches
_DPI = 110
_WIDTH, _LINES = 34, 3  # of a caption: letters, lines


def draw_sheet(data: Data, count: int, path: Path, resolutions: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Reads all pictures as `prepare` would, draws `count` of those it would keep into the PNG `path`, and returns its
    report.

    They are chosen by their SHA-256: the same ones each time, from all over the data set.

    Args:
        resolutions: of the bases that are to be trained, by name; what would be enlarged for one is told.

    Raises:
        UserError: there is nothing to train on, or there are prompts without pictures.
    """
    if not SOURCES.get(data.source).has_pictures:
        raise UserError(f"data.source: {data.source} has no pictures to look at; {data.path} is text")
    with temporary_folder() as folder:
        out = folder / "pictures"
        report = prepare(data, 1, out)
        for base, resolution in (resolutions or {}).items():
            enlargement.warn(data, base, resolution, out)
        kept = [record for part in PARTS for record in read_records(out / f"{part}.jsonl")]
    chosen = sorted(kept, key=lambda record: record.sha256)[:count]
    atomic_write(path, lambda place: _sheet(data, chosen, place))
    return report


def _sheet(data: Data, records: list[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(records))
    rows = math.ceil(len(records) / columns)
    figure = Figure(figsize=(columns * _CELL, rows * (_CELL + 0.6)), dpi=_DPI, layout="constrained")
    for axes, record in zip(figure.subplots(rows, columns, squeeze=False).flat, records, strict=False):
        picture = open_picture(data, record)
        picture.thumbnail((round(_CELL * _DPI), round(_CELL * _DPI)))
        axes.imshow(picture)
        lines = textwrap.wrap(record.caption, _WIDTH, max_lines=_LINES, placeholder=" ...")
        axes.set_title("\n".join(lines), fontsize=7, parse_math=False)
        axes.set_xlabel(f"{record.width} x {record.height}", fontsize=6, color="#6b6b6b")
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.savefig(path, format="png")
