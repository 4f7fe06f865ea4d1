"""Pictures that a person judges by: a grid of prompts against methods, and distance against cost."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw, ImageFont

from lcmlora.evaluation.figures import NAMES

K = TypeVar("K", bound=str)  # the name of a set

_COLOURS = {"student": "#c8322b", "teacher": "#222222", "ddim": "#4c78a8", "dpm++": "#59a14f", "unipc": "#b07aa1"}
_INK, _SOFT, _PAPER, _ACCENT = "#222222", "#6b6b6b", "#ffffff", "#c8322b"
_CELL_MIN, _CELL_MAX = 128, 256  # pixels of one picture in the grid
_GAP, _LABEL, _HEADER = 6, 150, 48


class Row(NamedTuple):
    """One method at one number of network evaluations, as the table for plots has it; empty where it has no setting."""

    method: str
    network_evaluations: int
    steps: int
    guidance_scale: float
    spacing: str
    karras: bool | str
    final: str
    distance_teacher: float
    excess: float
    retrieval: float


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    # The font that comes with matplotlib knows more alphabets than Pillow's own and is the same on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _cell(picture: Image.Image) -> Image.Image:
    """Enlarges small pictures by whole pixels, so that nothing is smoothed that the model did not draw."""
    side = picture.width
    if side < _CELL_MIN:
        factor = -(-_CELL_MIN // side)
        return picture.resize((side * factor, side * factor), Image.Resampling.NEAREST)
    if side > _CELL_MAX:
        return picture.resize((_CELL_MAX, _CELL_MAX), Image.Resampling.LANCZOS)
    return picture


def grid(captions: list[str], columns: Mapping[K, list[Image.Image]], counts: Mapping[K, str], path: Path) -> None:
    """Writes a PNG with a row for each caption and a column of square pictures for each key, like `dpm++@4`.

    Args:
        counts: what stands below the method's name: `4 evaluations`, or nothing.
    """
    side = _cell(next(iter(columns.values()))[0]).width
    width = _LABEL + len(columns) * (side + _GAP) + _GAP
    sheet = Image.new("RGB", (width, _HEADER + len(captions) * (side + _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, (key, pictures) in enumerate(columns.items()):
        left = _LABEL + column * (side + _GAP)
        method = key.partition("@")[0]
        ink = _ACCENT if method == "student" else _INK
        pen.text((left + side / 2, 16), NAMES.get(method, method), ink, _font(14, bold=True), anchor="mm")
        pen.text((left + side / 2, 34), counts[key], _SOFT, _font(12), anchor="mm")
        for row, picture in enumerate(pictures[: len(captions)]):
            sheet.paste(_cell(picture), (left, _HEADER + row * (side + _GAP)))
    for row, caption in enumerate(captions):
        middle = _HEADER + row * (side + _GAP) + side / 2
        lines = textwrap.wrap(caption, 18, max_lines=max(1, side // 20), placeholder=" ...")
        pen.multiline_text((_LABEL - 12, middle), "\n".join(lines), _INK, _font(13), anchor="rm", align="right")
    sheet.save(path, optimize=True)


def curves(rows: list[Row], floor: float, path: Path) -> None:
    """Writes a PNG: excess Frechet distance over the teacher's floor against network evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row.method for row in rows):
        mine = sorted((row.network_evaluations, row.excess) for row in rows if row.method == method)
        label = "student (LCM-LoRA)" if method == "student" else NAMES.get(method, method)
        width = 2.4 if method == "student" else 1.4
        costs, excess = zip(*mine, strict=True)
        axes.plot(costs, excess, marker="o", color=_COLOURS.get(method), label=label, linewidth=width)
    axes.axhline(0, color=_COLOURS["teacher"], linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = sorted({row.network_evaluations for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    # Linear up to the floor: the teacher stands at zero, and chance can bring a method below it.
    linear, top = max(floor, 1e-6), max(row.excess for row in rows)
    axes.set_yscale("symlog", linthresh=linear)
    levels = [0, *(v for n in range(-6, 9) for v in (10**n, 2 * 10**n, 5 * 10**n) if linear / 8 < v <= top)]
    axes.set_yticks(levels, [f"{level:g}" for level in levels])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations for one picture (a guided step costs two)")
    axes.set_ylabel("Frechet distance to the teacher,\nexcess over the floor")
    axes.set_title(f"Closeness to the teacher at equal cost (floor {floor:.1f} taken off)", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
