"""Pictures that a person judges by: a contact sheet of captions against methods, and distance against cost."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from lcmlora.evaluation.figures import NAMES

_COLOURS = {"student": "#c8322b", "teacher": "#222222", "ddim": "#4c78a8", "dpm++": "#59a14f", "unipc": "#b07aa1"}
_INK, _SOFT, _PAPER, _ACCENT, _TINT = "#222222", "#6b6b6b", "#ffffff", "#c8322b", "#fae9e7"
_CELL_MIN, _CELL_MAX = 128, 256  # pixels of one picture in the contact sheet
_GAP, _APART, _LABEL, _HEADER = 6, 20, 150, 62


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


class Column(NamedTuple):
    """A column of the contact sheet."""

    pictures: list[Image.Image]  # square, one for each caption
    name: str
    details: str = ""  # below the name, in small print
    group: str = ""  # what it has in common with its neighbours, such as `4 network evaluations`
    is_student: bool = False


def contact_sheet(captions: list[str], columns: list[Column], path: Path) -> None:
    """Writes a PNG with a row of pictures for each caption; neighbouring columns of one group have one title."""
    side = _cell(columns[0].pictures[0]).width
    details = [textwrap.wrap(column.details, side // 6) for column in columns]
    header = _HEADER + 15 * max(map(len, details))
    lefts = [_LABEL]
    for before, column in pairwise(columns):
        lefts.append(lefts[-1] + side + (_GAP if before.group == column.group else _APART))
    sheet = Image.new("RGB", (lefts[-1] + side + _APART, header + len(captions) * (side + _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, left, lines in zip(columns, lefts, details, strict=True):
        ink = _ACCENT if column.is_student else _INK
        if column.is_student:
            pen.rectangle((left - _GAP // 2, 28, left + side + _GAP // 2 - 1, sheet.height), _TINT)
        pen.text((left + side / 2, 42), column.name, ink, _font(14, bold=True), anchor="mm")
        pen.multiline_text((left + side / 2, 54), "\n".join(lines), _SOFT, _font(11), anchor="ma", align="center")
        for row, picture in enumerate(column.pictures[: len(captions)]):
            sheet.paste(_cell(picture), (left, header + row * (side + _GAP)))
    for group in filter(None, dict.fromkeys(column.group for column in columns)):
        places = [left for column, left in zip(columns, lefts, strict=True) if column.group == group]
        pen.text(((places[0] + places[-1] + side) / 2, 13), group, _INK, _font(14, bold=True), anchor="mm")
        pen.line((places[0], 26, places[-1] + side, 26), _SOFT)
    for row, caption in enumerate(captions):
        middle = header + row * (side + _GAP) + side / 2
        text = "\n".join(textwrap.wrap(caption, 18, max_lines=max(1, side // 20), placeholder=" ..."))
        pen.multiline_text((_LABEL - 12, middle), text, _INK, _font(13), anchor="rm", align="right")
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
