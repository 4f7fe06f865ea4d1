"""A contact sheet of some pictures of a data set with their captions, to look at before anything is encoded."""

from __future__ import annotations

import heapq
import itertools
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path

from lcmlora.config import Data
from lcmlora.data import enlargement
from lcmlora.data.prepare import PARTS, Report, prepare_pictures
from lcmlora.data.sources.source import Record, iter_records, open_picture
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write, temporary_folder
from lcmlora.plugins import SOURCES

_COLUMNS = 4
_CELL = 2.4  # inches, the side of a picture
_DPI = 110
_LINE_LENGTH, _MAX_LINES = 34, 3  # letters in a line of a caption, and its lines


def draw_sheet(data: Data, count: int, path: Path, resolutions: Mapping[str, int] | None = None) -> Report:
    """Draws `count` of the pictures that `prepare` would keep into the PNG `path`; returns the report of `prepare`.

    The pictures are chosen by their SHA-256: the same ones each time, from the whole data set.

    Args:
        resolutions: sides in pixels that the bases draw, by the base's name; warns of pictures that would be enlarged.

    Raises:
        UserError: there is nothing to train on, or the source has prompts and no pictures.
    """
    if not SOURCES.get(data.source).has_pictures:
        raise UserError(f"data.source: {data.source} has no pictures to look at; {data.path} is text")
    with temporary_folder() as folder:
        out = folder / "pictures"
        report = prepare_pictures(data, 1, out)
        for base, resolution in (resolutions or {}).items():
            enlargement.warn(data, base, resolution, out)
        kept = itertools.chain.from_iterable(iter_records(out / f"{part}.jsonl") for part in PARTS)
        chosen = heapq.nsmallest(count, kept, key=lambda record: record.sha256)
    atomic_write(path, lambda temporary: _draw(data, chosen, temporary))
    return report


def _draw(data: Data, records: list[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(records))
    rows = math.ceil(len(records) / columns)
    figure = Figure(figsize=(columns * _CELL, rows * (_CELL + 0.6)), dpi=_DPI, layout="constrained")
    for axes, record in zip(figure.subplots(rows, columns, squeeze=False).flat, records, strict=False):
        picture = open_picture(data, record)
        picture.thumbnail((round(_CELL * _DPI), round(_CELL * _DPI)))
        axes.imshow(picture)
        lines = textwrap.wrap(record.caption, _LINE_LENGTH, max_lines=_MAX_LINES, placeholder=" ...")
        axes.set_title("\n".join(lines), fontsize=7, parse_math=False)
        axes.set_xlabel(f"{record.width} x {record.height}", fontsize=6, color="#6b6b6b")
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    figure.savefig(path, format="png")
