"""The report page of a release: one HTML file with its pictures embedded, which needs no script and no network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from lcmlora.config import Base
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import REAL, STUDENT, TEACHER, Advantage, Agreement, Key, Metrics, Saving
from lcmlora.evaluation.gate import unmeasured_diversity, unmeasured_retrieval
from lcmlora.evaluation.measures.distances import title_of
from lcmlora.releases.bundle import Provenance
from lcmlora.releases.clients import Student
from lcmlora.releases.pages.album import SMALL, Album
from lcmlora.releases.pages.gallery import everything, ordered, own_prompts_of, side_by_side, worst_of
from lcmlora.releases.pages.numbers import decimals, fixed, milliseconds, over, span
from lcmlora.releases.pages.plots import Chart, Point, chart
from lcmlora.releases.pages.step_counts import step_counts
from lcmlora.releases.pages.studied import swept, varied, weighed
from lcmlora.releases.pages.usage import style_weights, usage
from lcmlora.templates.loading import load_template


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
    check, used = provenance.sampler_check, style_weights(figures)
    return load_template("report.html.j2", _filters(figures)).render(
        model=model,
        figures=figures,
        provenance=provenance,
        base_license=base.license,
        compatibility=compatibility,
        usage=usage(model, base, student, kohya_file, weights=used, check=check),
        distance=title_of(figures.features.distance),
        places=decimals(figures.excess.values()),
        check_places=decimals(figures.check.excess.values()) if figures.check else 0,
        keys=ordered(figures),
        teacher=figures.teacher,
        headline=headline,
        step_counts=step_counts(figures, provenance.gate),
        recommended=provenance.recommended_steps,
        no_diversity=unmeasured_diversity(figures, headline.key),
        charts=_charts(figures),
        beside=side_by_side(figures, album),
        everything=everything(figures, album),
        own=own_prompts_of(figures, album),
        worst=worst_of(figures, album),
        guidance=swept(guidance, album) if guidance else None,
        variations=[varied(name, facts, steps, album) for name, facts in variations.items()],
        weights=weighed(weights, album) if weights else None,
        cells=_cell_sizes(album.side),
        pixelated=album.side <= SMALL,
        params=json.dumps(provenance.params.plain(), indent=2, sort_keys=True, ensure_ascii=False),
    )


def _filters(figures: Metrics) -> dict[str, Callable[..., object]]:
    """Returns the functions by which the template shows values."""
    return {
        "fixed": fixed,
        "span": span,
        "milliseconds": milliseconds,
        "label": lambda key: figures.label(Key(key)),
        "over": over,
        "marked": marked,
        "comparisons": comparisons,
    }


def marked(text: str) -> Markup:
    """Returns Markdown's `code` as HTML. The rest of the text is escaped, and its quotes are a printer's."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(_printed(part)) for i, part in enumerate(parts)
    )


def _printed(text: str) -> str:
    return re.sub(r'"([^"]*)"', "\u201c\\1\u201d", text).replace("'", "\u2019")


@dataclass(frozen=True)
class Comparison:
    """A student and the best solver at as many network evaluations."""

    student: Key
    evaluations: int
    rival: Key | None
    won: Advantage | None
    saving: Saving | None
    agreement: Agreement | None  # of the second features


def comparisons(figures: Metrics) -> list[Comparison]:
    """Returns the student at each of its numbers of steps, beside the best solver at as many network evaluations."""
    found = []
    for student in figures.students:
        won, evaluations = figures.advantage.get(student), figures.network_evaluations[student]
        rival = won.rival if won else figures.best_solver(evaluations)
        found.append(
            Comparison(student, evaluations, rival, won, figures.savings.get(student), figures.agreement(student))
        )
    return found


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
    drawn = [key for key in ordered(figures) if key.method == STUDENT]
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
        return {"wide": 128, "narrow": 80}
    return {"wide": side * max(1, round(128 / side)), "narrow": side * max(1, 64 // side)}


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
        places = 3 if kind == "retrieval" else decimals(figures.excess.values())
        curves: dict[str, list[Point]] = {}
        for key in ordered(figures):
            if key == teacher or key not in values:
                continue
            value, interval = values[key], figures.interval(kind, key)
            text = f"{figures.label(key)}, {cost[key]} network evaluations: {fixed(value, places)}"
            text += f" ({span(interval, places)})" if interval else ""
            low, high = interval or (value, value)
            point = Point(cost[key], value, low, high, text)
            curves.setdefault(key.method, []).append(point)
        sizes = {"wide": (520, 350, 104), "narrow": (350, 340, 106)}
        drawings = {name: chart(curves, levels, scale, *size) for name, size in sizes.items()}
        charts.append(Curves(title, "lower" if kind == "excess" else "higher", drawings))
    return charts
