"""The report page of a release: one HTML file with its pictures embedded, which needs no script and no network."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup, escape

from lcmlora.config import Base
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.comparisons.worst import WORST_PICTURES
from lcmlora.evaluation.figures import (
    PARTS,
    REAL,
    STUDENT,
    TEACHER,
    Advantage,
    Agreement,
    Guidance,
    Key,
    Metrics,
    Saving,
    Variation,
    WeightsGrid,
    WorstCaptions,
)
from lcmlora.evaluation.gate import unmeasured_diversity, unmeasured_retrieval
from lcmlora.evaluation.measures.distances import title_of
from lcmlora.evaluation.sets.own_prompts import OWN_PICTURES
from lcmlora.io.documents import Interval
from lcmlora.releases.bundle import Provenance
from lcmlora.releases.clients import Student, drawing_arguments, instructions, loading_arguments, notes
from lcmlora.releases.pages.album import SMALL, Album, Picture
from lcmlora.releases.pages.plots import MINUS, Chart, Point, chart
from lcmlora.templates.loading import load_template

_PICTURED = 2  # numbers of network evaluations at which a variation shows pictures

_NONE = "\N{EN DASH}"


def render_report(
    model: str,
    figures: Metrics,
    provenance: Provenance,
    evaluation: Path | Sequence[Path],
    *,
    base: Base,
    kohya_file: str,
    student: Student,
    compatibility: Compatibility | None = None,
) -> str:
    """Returns the page. The same inputs give the same bytes.

    Args:
        figures: metrics/MODEL.json. Sections whose figures are missing, empty or null are left out.
        provenance: provenance.json of the release.
        evaluation: the folder that `evaluate` wrote, or several that share the pictures: `study` writes its own.
        base: with its licence, which the adapter inherits.
        kohya_file: the name of the release's file for ComfyUI and A1111.
        student: in the recommended number of steps, for the instructions.
        compatibility: the figures with additions to the base, if they were measured.

    Raises:
        UserError: a picture that the figures speak of is missing or has another size.
    """
    variations, guidance, weights = figures.variations, figures.guidance, figures.weights
    steps = provenance.params.gate.steps
    headline = _headline(figures, steps)
    shown = len(figures.network_evaluations) + 1 + (len(guidance.scales) if guidance else 0) + 7 * len(variations)
    album = Album([evaluation] if isinstance(evaluation, Path) else evaluation, shown)
    filters: dict[str, Callable[..., str]] = {
        "fixed": fixed,
        "span": span,
        "milliseconds": milliseconds,
        "label": lambda key: figures.label(Key(key)),
        "over": over,
        "marked": marked,
    }
    return load_template("report.html.j2", filters).render(
        model=model,
        figures=figures,
        provenance=provenance,
        base_license=base.license,
        style=base.style,
        load=loading_arguments(model, base),
        call=drawing_arguments(student, provenance.sampler_check.side if provenance.sampler_check else None),
        kohya=kohya_file,
        recommended=student.steps,
        clients=instructions(student, kohya_file),
        notes=notes(student.steps),
        compatibility=compatibility,
        distance=title_of(figures.features.distance),
        places=_places(figures.excess.values()),
        check_places=_places(figures.check.excess.values()) if figures.check else 0,
        keys=_ordered(figures),
        teacher=figures.teacher,
        headline=headline,
        no_diversity=unmeasured_diversity(figures, headline.key),
        charts=_charts(figures),
        beside=_side_by_side(figures, album),
        prompts=_prompts(figures, album),
        own=_own_prompts(figures.own_prompts, album),
        worst=_worst(figures, album),
        guidance=_guidance(guidance, album) if guidance else None,
        variations=[_variation(name, facts, steps, album) for name, facts in variations.items()],
        weights=_weights(weights, album) if weights else None,
        cells=_cell_sizes(album.side),
        pixelated=album.side <= SMALL,
        params=json.dumps(provenance.params.plain(), indent=2, sort_keys=True, ensure_ascii=False),
    )


def fixed(value: float | None, places: int = 3, *, signed: bool = False) -> str:
    """Returns a number with a true minus sign, `–` for none. What rounds to zero has no sign."""
    if value is None:
        return _NONE
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def span(interval: Interval | None, places: int = 3) -> str:
    """Returns `low to high`, or nothing where there is no interval."""
    return f"{fixed(interval[0], places)} to {fixed(interval[1], places)}" if interval else ""


def milliseconds(seconds: float | None) -> str:
    """Returns seconds as milliseconds with three figures, `–` for none."""
    if seconds is None:
        return _NONE
    value = 1000 * seconds
    return fixed(value, max(0, min(3, 2 - math.floor(math.log10(value)))) if value > 0 else 0)


def over(value: float, whole: float, form: str) -> str:
    """Returns value / whole in this form, `–` where there is nothing to divide by."""
    return form % (value / whole) if whole else _NONE


def marked(text: str) -> Markup:
    """Returns Markdown's `code` as HTML; the rest of the text is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _places(values: Iterable[float]) -> int:
    """Returns how many decimals show three figures of the median of these distances, zeros apart."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return min(6, max(0, 2 - math.floor(math.log10(statistics.median(sizes))))) if sizes else 2


def _ordered(figures: Metrics) -> list[Key]:
    """Returns the keys by method, the student first and the teacher last, each by steps."""

    def place(key: Key) -> tuple[int, str, int]:
        return {STUDENT: 0, TEACHER: 2}.get(key.method, 1), key.method, key.number

    return sorted(figures.network_evaluations, key=place)


@dataclass(frozen=True)
class Headline:
    """The result that the page begins with."""

    key: Key
    steps: int
    evaluations: int
    won: Advantage | None
    verdict: str  # closer, farther or undecided
    share: float | None  # of the teacher's retrieval
    unmeasured: str | None
    fewer: float  # how many times as many evaluations the teacher takes
    saving: Saving | None
    agreement: Agreement | None  # of the second features


def _headline(figures: Metrics, steps: int) -> Headline:
    """Returns the student's result at the gate's steps, or at its largest number if it was not drawn in these."""
    drawn = [key for key in _ordered(figures) if key.method == STUDENT]
    key = gated if (gated := Key.of(STUDENT, steps)) in drawn else drawn[-1]
    cost, retrieval = figures.network_evaluations, figures.retrieval
    won = figures.advantage.get(key)
    low, high = won.interval if won and won.interval else (0.0, 0.0)
    unmeasured = unmeasured_retrieval(figures)
    return Headline(
        key=key,
        steps=key.steps,
        evaluations=cost[key],
        won=won,
        verdict="closer" if high < 0 else "farther" if low > 0 else "undecided",
        share=None if unmeasured else retrieval[key] / retrieval[figures.teacher],
        unmeasured=unmeasured,
        fewer=cost[figures.teacher] / cost[key],
        saving=figures.savings.get(key),
        agreement=figures.agreement(key),
    )


def _cell_sizes(side: int) -> dict[str, int]:
    """Returns how large a picture is shown, in CSS pixels: small ones by whole factors, so that pixels stay alike."""
    if side > SMALL:
        return {"wide": 136, "narrow": 80}
    return {"wide": side * max(1, round(128 / side)), "narrow": side * max(1, 64 // side)}


class Column(NamedTuple):
    """A column of pictures: its key, and what neighbours of one group have in common."""

    key: Key
    name: str
    details: str = ""
    group: str = ""


@dataclass(frozen=True)
class PictureTable:
    """Pictures by captions and methods."""

    columns: list[Column]
    rows: list[tuple[str, list[Picture]]]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The titles over the columns, each with its number of columns."""
        return [(title, len(list(group))) for title, group in itertools.groupby(each.group for each in self.columns)]


def _side_by_side(figures: Metrics, album: Album, group: str = "") -> PictureTable:
    """Returns real pictures, the teacher's, and the best solver's beside the student's at equal network evaluations.

    Args:
        group: the folder of the pictures.
    """
    columns = [Column(Key(REAL), "real")] if figures.real_pictures != 0 else []
    columns.append(Column(figures.teacher, "teacher", figures.count_label(figures.teacher)))
    for rival, student in figures.pairs:
        columns += [_column(figures, key, figures.network_evaluations[student]) for key in (rival, student) if key]
    return _picture_table(figures, columns, album, group)


def _column(figures: Metrics, key: Key, evaluations: int) -> Column:
    details = figures.baselines[key].text if key in figures.baselines else figures.count_label(key)
    return Column(key, key.name, details, f"{evaluations} network evaluation{'' if evaluations == 1 else 's'}")


def _picture_table(figures: Metrics, columns: list[Column], album: Album, group: str) -> PictureTable:
    pictures = [album.thumbnails(each.key, figures.label(each.key), group) for each in columns]
    captions = album.prompts_of(group) if group else album.prompts
    return PictureTable(columns, [(captions[i], list(row)) for i, row in enumerate(zip(*pictures, strict=True))])


@dataclass(frozen=True)
class Worst:
    """The captions at which the student is worst, with pictures; the figures stand in the same order as the rows."""

    facts: WorstCaptions
    places: int
    pictures: PictureTable


def _worst(figures: Metrics, album: Album) -> Worst | None:
    facts = figures.worst
    if facts is None:
        return None
    columns = [Column(Key(REAL), "real")] if figures.real_pictures != 0 else []
    columns.append(Column(figures.teacher, "teacher", figures.count_label(figures.teacher)))
    count = figures.network_evaluations[facts.student]
    columns += [_column(figures, key, count) for key in (facts.rival, facts.student) if key]
    places = _places([each.student for each in facts.captions])
    return Worst(facts, places, _picture_table(figures, columns, album, WORST_PICTURES))


@dataclass(frozen=True)
class OwnPrompts:
    """The section on prompts of one's own."""

    figures: Metrics
    places: int
    pictures: PictureTable


def _own_prompts(figures: Metrics | None, album: Album) -> OwnPrompts | None:
    if figures is None:
        return None
    return OwnPrompts(figures, _places(figures.excess.values()), _side_by_side(figures, album, OWN_PICTURES))


Row = tuple[str, str, float | None, list[Picture | None]]  # method, name, evaluations a step, pictures by steps


@dataclass(frozen=True)
class Block:
    """The pictures of one prompt."""

    prompt: str
    real: Picture | None
    teacher: Picture
    rows: list[Row]


@dataclass(frozen=True)
class Prompts:
    """The pictures of all prompts, methods by steps, or by network evaluations."""

    steps: list[int]
    teacher_steps: int
    blocks: list[Block]


def _prompts(figures: Metrics, album: Album) -> Prompts:
    """Returns, for each prompt, the real picture if any, the teacher's, and for each method a row of pictures by
    steps."""
    cost, teacher, real = figures.network_evaluations, figures.teacher, Key(REAL)
    keys = [key for key in _ordered(figures) if key != teacher]
    also = [] if figures.real_pictures == 0 else [real]
    thumbnails = {key: album.thumbnails(key, figures.label(key)) for key in (*also, teacher, *keys)}
    steps = sorted({key.number for key in keys})
    methods = []
    for method in dict.fromkeys(key.method for key in keys):
        rates = {cost[key] / key.number for key in keys if key.method == method}
        methods.append((method, Key(method).name, rates.pop() if len(rates) == 1 else None))
    blocks = []
    for i, prompt in enumerate(album.prompts):
        drawn = {key: row[i] for key, row in thumbnails.items()}
        rows = [(*method, [drawn.get(Key.of(method[0], n)) for n in steps]) for method in methods]
        blocks.append(Block(prompt, drawn.get(real), drawn[teacher], rows))
    return Prompts(steps, teacher.steps, blocks)


@dataclass(frozen=True)
class Sweep:
    """The student by guidance scales: rows of a table, and pictures by prompts."""

    steps: int
    scales: list[float]
    rows: list[tuple[float, int, float, float, float | None]]
    best: float
    places: int
    shown: list[tuple[str, tuple[Picture, ...]]]


def _guidance(facts: Guidance, album: Album) -> Sweep:
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
        places=_places(facts.excess),
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


def _variation(name: str, facts: Variation, steps: int, album: Album) -> Varied:
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
        places=_places(distance.values()),
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


def _weights(facts: WeightsGrid, album: Album) -> Weighed:
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
        places=_places(values),
        shades=[
            [(worst - value) / (worst - best) if worst > best else 0.0 for value in row] for row in facts.distance_real
        ],
        shown=list(zip(facts.style_weights, album.sheet("weights", labels), strict=True)),
    )


@dataclass(frozen=True)
class Curves:
    """A figure of all methods against network evaluations, drawn for a wide and for a narrow page."""

    title: str
    better: str  # lower or higher
    drawings: dict[str, Chart]


def _charts(figures: Metrics) -> list[Curves]:
    cost, retrieval, teacher = figures.network_evaluations, figures.retrieval, figures.teacher
    # Linear around zero, where the teacher stands and below which chance can bring a method; logarithmic far from it.
    unit = max(abs(figures.floor) / 4, max(map(abs, figures.excess.values())) / 200, 1e-9)
    real = {"real pictures": retrieval[Key(REAL)]} if REAL in retrieval else {}
    charts = []
    for kind, values, title, levels, scale in (
        ("excess", figures.excess, "Excess distance to the teacher", {TEACHER: 0.0}, lambda v: math.asinh(v / unit)),
        ("retrieval", retrieval, "Caption retrieval", {TEACHER: retrieval[teacher]} | real, None),
    ):
        places = 3 if kind == "retrieval" else _places(figures.excess.values())
        curves: dict[str, list[Point]] = {}
        for key in _ordered(figures):
            if key == teacher or key not in values:
                continue
            value, interval = values[key], figures.interval(kind, key)
            text = f"{figures.label(key)}, {cost[key]} network evaluations: {fixed(value, places)}"
            text += f" ({span(interval, places)})" if interval else ""
            low, high = interval or (value, value)
            point = Point(cost[key], value, low, high, text)
            curves.setdefault(key.method, []).append(point)
        sizes = {"wide": (520, 400, 104), "narrow": (350, 340, 106)}
        drawings = {name: chart(curves, levels, scale, *size) for name, size in sizes.items()}
        charts.append(Curves(title, "lower" if kind == "excess" else "higher", drawings))
    return charts
