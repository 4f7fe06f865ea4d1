"""The geometry of charts of figures against network evaluations, in pixels; the report's template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lcmlora.evaluation.figures import Key
from lcmlora.releases.pages.numbers import MINUS


class Point(NamedTuple):
    """A figure at its cost, with the ends of its interval. Without an interval, these are the figure itself."""

    evaluations: int
    value: float
    low: float
    high: float
    text: str


class Name(NamedTuple):
    """The label of a curve or a horizontal line, at the line's right end."""

    text: str
    css: str
    x: float
    y: float


class Line(NamedTuple):
    """A method's curve. Each point has x, y, the ends of its interval, and a text."""

    method: str
    spots: list[tuple[float, float, float, float, str]]


class Chart(NamedTuple):
    """A chart in pixels, from the upper left corner."""

    width: int
    height: int
    frame: tuple[float, float, float, float]  # left, top, right, bottom
    columns: list[tuple[float, str]]
    rows: list[tuple[float, str]]
    levels: list[float]
    lines: list[Line]
    names: list[tuple[Name, float, float]]


def chart(
    curves: dict[str, list[Point]],
    levels: dict[str, float],
    scale: Callable[[float], float] | None,
    width: int,
    height: int,
    margin: int,
) -> Chart:
    """Returns the geometry of a chart in pixels, for the template to draw.

    Args:
        curves: points for each method.
        levels: horizontal lines by their names.
        scale: an increasing function; the vertical axis is linear in its values. None for a linear axis.
        margin: pixels at the right, for the labels.
    """
    points = [point for curve in curves.values() for point in curve]
    costs = sorted({point.evaluations for point in points})
    bounds = [0.0, *levels.values(), *(v for point in points for v in (point.low, point.value, point.high))]
    left, right, top, bottom = 44.0, float(width - margin), 34.0, float(height - 46)
    inset = 5.0 * len(curves)  # room for the outermost of the points side by side
    octaves = math.log2(costs[-1] / costs[0]) or 1.0
    rows, scale = (_even(bounds), float) if scale is None else (_round(bounds), scale)
    low, high = scale(min(bounds)), scale(max(bounds))

    def across(cost: float) -> float:
        return left + inset + (right - left - 2 * inset) * math.log2(cost / costs[0]) / octaves

    def up(value: float) -> float:
        return bottom - 8 - (bottom - top - 16) * (scale(value) - low) / ((high - low) or 1.0)

    names = [Name(name, "level", right, up(value)) for name, value in levels.items()]
    lines = []
    for method, curve in curves.items():
        spots = []
        for point in sorted(curve):
            # Points of equal cost are drawn side by side, so that none hides another's interval.
            beside = [name for name, other in curves.items() if any(o.evaluations == point.evaluations for o in other)]
            aside = (beside.index(method) - (len(beside) - 1) / 2) * (6 if width > 400 else 4)
            x = across(point.evaluations) + aside
            spots.append((x, up(point.value), up(point.low), up(point.high), point.text))
        lines.append(Line(method, spots))
        names.append(Name(Key(method).name, method, *spots[-1][:2]))
    return Chart(
        width=width,
        height=height,
        frame=(left, top, right, bottom),
        columns=_apart([(across(cost), f"{cost}") for cost in costs], 24),
        rows=_apart([(up(value), f"{value:g}".replace("-", MINUS)) for value in rows], 24),
        levels=[up(value) for value in levels.values()],
        lines=lines,
        names=_spread(names, right + 12, top, bottom),
    )


def _round(bounds: list[float]) -> list[float]:
    """Returns zero and 1, 2, 5 times powers of ten between the bounds, the preferred ticks first."""
    low, high = min(bounds), max(bounds)
    exponents = range(math.floor(math.log10(max(-low, high, 1e-9))), -10, -1)
    sizes = [step * 10.0**n for step in (1, 5, 2) for n in exponents]
    return [0.0, *(value for size in sizes for value in (size, -size) if low <= value <= high)]


def _even(bounds: list[float]) -> list[float]:
    """Returns some five round values between the bounds, at equal distances."""
    low, high = min(bounds), max(bounds)
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(ticks: list[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Returns the ticks that are at least `gap` pixels from all before them."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if all(abs(tick[0] - other) >= gap for other, _ in kept):
            kept.append(tick)
    return kept


def _spread(names: list[Name], x: float, top: float, bottom: float, gap: float = 16) -> list[tuple[Name, float, float]]:
    """Returns the labels with their places in a column at `x`, near their lines and `gap` pixels apart."""
    ordered = sorted(names, key=lambda name: name.y)
    # Least squares under the gap: labels that would overlap form a block around the mean of their preferred places.
    blocks: list[tuple[float, int]] = []
    for i, name in enumerate(ordered):
        mean, count = name.y - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, size = blocks.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        blocks.append((mean, count))
    places = [mean + gap * i for i, mean in enumerate(mean for mean, count in blocks for _ in range(count))]
    shift = max(top - places[0], min(0.0, bottom - places[-1]))
    return [(name, x, y + shift) for name, y in zip(ordered, places, strict=True)]
