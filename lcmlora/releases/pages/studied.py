"""What a report page shows of a study: guidance on top of the adapter, styles and checkpoints, their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcmlora.evaluation.figures import PARTS, REAL, STUDENT, Guidance, Key, Variation, WeightsGrid
from lcmlora.releases.pages.album import Album, Picture
from lcmlora.releases.pages.numbers import decimals

_PICTURED = 2  # numbers of network evaluations at which a variation shows pictures


@dataclass(frozen=True)
class Sweep:
    """The student by guidance scales: rows of a table, and pictures by prompts."""

    steps: int
    scales: list[float]
    rows: list[tuple[float, int, float, float, float | None]]
    best: float
    places: int
    shown: list[tuple[str, tuple[Picture, ...]]]


def swept(facts: Guidance, album: Album) -> Sweep:
    """Returns the sweep of guidance scales. Raises UserError where a picture is missing."""
    student = Key.of(STUDENT, facts.steps).label
    thumbnails = [
        album.thumbnails(f"guidance@{scale:g}", f"{student}, guidance scale {scale:g}") for scale in facts.scales
    ]
    columns = (facts.network_evaluations, facts.excess, facts.retrieval, facts.diversity)
    return Sweep(
        steps=facts.steps,
        scales=facts.scales,
        rows=list(zip(facts.scales, *columns, strict=True)),
        best=min(facts.excess),
        places=decimals(facts.excess),
        shown=list(zip(album.prompts, zip(*thumbnails, strict=True), strict=True)),
    )


@dataclass(frozen=True)
class Varied:
    """A style's or a checkpoint's figures by network evaluations, and pictures around the gate's steps."""

    name: str
    noun: str
    facts: Variation
    parts: dict[str, str]
    rows: dict[int, dict[str, Key]]
    best: dict[int, Key]
    places: int
    columns: dict[int, list[tuple[str, Key]]]
    shown: list[tuple[str, tuple[Picture, ...]]]


def varied(name: str, facts: Variation, steps: int, album: Album) -> Varied:
    """Returns a style or a checkpoint, with pictures at the numbers of network evaluations nearest to the gate's steps.

    Raises:
        UserError: a picture is missing.
    """
    distance, cost = facts.distance_real, facts.network_evaluations
    rows: dict[int, dict[str, Key]] = {}
    for key in sorted(distance, key=lambda key: (cost[key], -distance[key])):  # the best of equals comes last and stays
        rows.setdefault(cost[key], {})[key.part or key.method] = key
    parts = [part for part in PARTS if any(part in row for row in rows.values())]
    claimed = {claim.evaluations for claim in facts.claims} & set(rows) or set(rows)
    chosen = sorted(claimed, key=lambda count: abs(math.log2(count / steps)))[:_PICTURED]
    columns = [(count, part, rows[count][part]) for count in sorted(chosen) for part in parts if part in rows[count]]
    thumbnails = [album.thumbnails(REAL, f"real, {name}", name)]
    for _, part, key in columns:
        what = "" if part == "adapter" else f"{name} alone, " if part == "alone" else f"{name} "
        thumbnails.append(album.thumbnails(key, what + key.label, name))
    return Varied(
        name=name,
        noun="style" if facts.kind == "style" else "checkpoint",
        facts=facts,
        parts={part: PARTS[part] for part in parts},
        rows=rows,
        best={count: min(row.values(), key=distance.__getitem__) for count, row in rows.items()},
        places=decimals(distance.values()),
        columns={count: [(part, key) for n, part, key in columns if n == count] for count in sorted(chosen)},
        shown=list(zip(album.prompts_of(name), zip(*thumbnails, strict=True), strict=True)),
    )


@dataclass(frozen=True)
class Weighed:
    """The grid of style and adapter weights: distances, shades in [0, 1] (1 the best), and pictures."""

    facts: WeightsGrid
    prompt: str
    best: float
    places: int
    shades: list[list[float]]
    shown: list[tuple[float, list[Picture]]]


def weighed(facts: WeightsGrid, album: Album) -> Weighed:
    """Returns the grid of weights. Raises UserError where a picture is missing."""
    values = [value for row in facts.distance_real for value in row]
    best, worst = min(values), max(values)
    steps = f"{facts.steps} step{'' if facts.steps == 1 else 's'}"
    prompt = album.prompts[0] if facts.prompt is None else facts.prompt
    labels = [
        [f"{facts.style} weight {x:g}, adapter weight {y:g}, {steps}: {prompt}" for y in facts.adapter_weights]
        for x in facts.style_weights
    ]
    return Weighed(
        facts=facts,
        prompt=prompt,
        best=best,
        places=decimals(values),
        shades=[
            [(worst - value) / (worst - best) if worst > best else 0.0 for value in row] for row in facts.distance_real
        ],
        shown=list(zip(facts.style_weights, album.sheet("weights", labels), strict=True)),
    )
