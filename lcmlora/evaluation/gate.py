"""The gate: why a candidate must not become champion. Also the names of figures in MLflow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from lcmlora.config import Gate
from lcmlora.evaluation.comparisons.compatibility import Compatibility, shortfalls
from lcmlora.evaluation.figures import STUDENT, Key, Metrics
from lcmlora.io.documents import Interval


def gate_failures(metrics: Metrics, gate: Gate, compatibility: Compatibility | None = None) -> list[str]:
    """Returns why a candidate with these metrics must not become champion, a line for each reason; empty if it may.

    The student at `gate.steps` must have a smaller excess over the teacher's floor than every solver at as many network
    evaluations, by more than chance where `gate.beyond_chance` asks for it and there are intervals; an excess of at
    most `gate.max_excess` where one is set; at least `gate.min_diversity` of the teacher's diversity of seeds where
    that can be measured; and at least `gate.min_retrieval` of the teacher's caption retrieval, which must have been
    measured. Its scores must lie within `gate.limits`, and additions to the base that `gate.compatible` names must not
    have failed. How it compares with the champion is another question: `against`.

    Args:
        compatibility: the figures with additions, if they were tried with this adapter.
    """
    student, excess, cost = Key.of(STUDENT, gate.steps), metrics.excess, metrics.network_evaluations
    if student not in excess:
        drawn = ", ".join(key for key in excess if key.method == STUDENT)
        return [
            f"{student}: was not drawn (gate.steps); evaluation.student_steps gave {drawn or 'nothing'}; add "
            f"{gate.steps} to them, or change gate.steps"
        ]
    failures = _beyond_limits(metrics, gate, student) + shortfalls(compatibility, gate.compatible, gate.steps)
    rivals = metrics.solvers_at(cost[student])
    if not rivals:
        odd = cost[student] % 2 == 1  # an odd number of evaluations is only possible without guidance
        unguided = " (with a solver of guidance scale 1, since a guided step costs two)" if odd else ""
        failures.append(
            f"{student}: no solver was drawn at its {cost[student]} network evaluations, so nothing was beaten; "
            f"add {cost[student]} to evaluation.solver_evaluations{unguided}, or change gate.steps"
        )
    for rival in rivals:
        if not excess[student] < excess[rival]:  # written so that a NaN fails
            failures.append(
                f"{student}: excess Frechet distance {excess[student]:.2f} is not below {metrics.named(rival)}'s "
                f"{excess[rival]:.2f} at {cost[student]} network evaluations: "
                f"{excess[student] - excess[rival]:.2f} too high"
            )
    ahead = rivals and all(excess[student] < excess[rival] for rival in rivals)
    if gate.beyond_chance and ahead and (reason := _within_chance(metrics, student)):
        failures.append(f"{student}: {reason} (gate.beyond_chance)")
    if gate.max_excess is not None and not excess[student] <= gate.max_excess:
        failures.append(
            f"{student}: excess distance {excess[student]:.2f} is above {gate.max_excess:.2f} (gate.max_excess): "
            f"{excess[student] - gate.max_excess:.2f} too high"
        )
    if gate.min_diversity and not unmeasured_diversity(metrics, student):
        failures += _short_of_teacher(metrics, "diversity", "diversity of seeds", student, gate.min_diversity)
    if gate.min_retrieval and (reason := unmeasured_retrieval(metrics)):
        failures.append(
            f"{student}: caption retrieval was not measured: {reason}; keep more captions from training "
            "(data.test), or set gate.min_retrieval to 0"
        )
        return failures
    return failures + _short_of_teacher(metrics, "retrieval", "caption retrieval", student, gate.min_retrieval)


def by_steps(metrics: Metrics, gate: Gate, compatibility: Compatibility | None = None) -> dict[int, list[str]]:
    """Returns why the student is not within the gate's limits, by each number of steps that it was drawn in; an empty
    list where it is. That is what `gate_failures` would say if `gate.steps` were that number."""
    return {
        key.steps: gate_failures(metrics, gate.model_copy(update={"steps": key.steps}), compatibility)
        for key in metrics.students
    }


def _short_of_teacher(
    metrics: Metrics, figure: Literal["diversity", "retrieval"], name: str, student: Key, share: float
) -> list[str]:
    """Returns a line if the student's figure is below this share of the teacher's."""
    values, teacher = getattr(metrics, figure), metrics.teacher
    reached, needed = values[student], share * values[teacher]
    if reached >= needed:
        return []
    return [
        f"{student}: {name} {reached:.3f} is below {needed:.3f} ({share:g} of {teacher}'s {values[teacher]:.3f}): "
        f"{needed - reached:.3f} too low"
    ]


def _beyond_limits(metrics: Metrics, gate: Gate, student: Key) -> list[str]:
    """Returns a line for each score of the student that `gate.limits` does not allow, or that was not measured."""
    failures = []
    for name, limit in gate.limits.items():
        values = [values for scorer, values in metrics.scores.items() if scorer.partition("/")[0] == name]
        if not values or student not in values[0]:
            failures.append(f"{student}: {name} was not measured (gate.limits); add it to evaluation.scores")
            continue
        value = values[0][student]
        for bound, side, far in ((limit.min, "below", "low"), (limit.max, "above", "high")):
            if bound is not None and not (value >= bound if side == "below" else value <= bound):  # a NaN fails
                failures.append(
                    f"{student}: {name} {value:.4g} is {side} {bound:.4g} (gate.limits): "
                    f"{abs(value - bound):.4g} too {far}"
                )
    return failures


def _within_chance(metrics: Metrics, student: Key) -> str | None:
    """Returns why other captions or seeds may undo the student's lead over the best solver; None if they may not, or if
    there are no intervals."""
    lead = metrics.advantage.get(student)
    if metrics.intervals is None or lead is None or lead.interval is None:
        return None
    if metrics.intervals.captions == 1:
        return (
            "it was compared on one caption, which says nothing of others; add captions, or keep more of them from "
            "training (data.test)"
        )
    low, high = lead.interval
    if high < 0:
        return None
    return (
        f"its lead of {-lead.difference:.2f} over {lead.rival} may be chance: the difference is between {low:.2f} and "
        f"{high:.2f} ({metrics.intervals.level:.0%} interval, {metrics.drawn}); draw more pictures "
        "(evaluation.pictures), or keep more captions from training (data.test)"
    )


def unmeasured_retrieval(metrics: Metrics) -> str | None:
    """Returns why caption retrieval cannot judge a student (it can fail with few captions), or None if it can."""
    if not metrics.retrieval[metrics.teacher] > 0:
        return f"{metrics.teacher} meets none of its captions"
    if metrics.prompts == 1:
        return "there is one caption, which every picture has"
    return None


def unmeasured_diversity(metrics: Metrics, student: Key) -> str | None:
    """Returns why the diversity of seeds cannot judge this student, or None if it can."""
    if not metrics.diversity.keys() >= {metrics.teacher, student}:
        if metrics.prompts is not None and metrics.prompts >= metrics.pictures:
            return "each caption has one picture"
        return "the figures have none"
    if not metrics.diversity[metrics.teacher] > 0:
        return f"{metrics.teacher} draws the same picture from all seeds"
    return None


def incomparable(metrics: Metrics, champion: Metrics) -> str | None:
    """Returns why two evaluations cannot be compared; None where features, prompts, seeds and teacher are the same."""
    mine, theirs = metrics.features.name, champion.features.name
    if mine != theirs:
        return f"its features are {mine}, the other's {theirs}"
    if metrics.reference_digest != champion.reference_digest:
        return "it was measured against other pictures of the teacher (reference_digest)"
    return None


def against(metrics: Metrics, champion: Metrics, gate: Gate, name: str) -> list[str]:
    """Returns in what a candidate is worse than the champion, a line for each figure; empty if in nothing.

    Both were drawn for the same captions, so that only the seeds are chance between them. Worse means by more than the
    confidence interval of the difference over other seeds, whose half width is the root of the sum of both squared half
    widths: as if the two were drawn from independent noise. They share it, which makes the true interval narrower, so
    that the gate errs on the candidate's side. Without intervals (resamples: 0) any loss is too much.

    Args:
        champion: measured on the same features, prompts and teacher; see `incomparable`.
        name: of the champion, for the messages.
    """
    student = Key.of(STUDENT, gate.steps)
    if student not in metrics.excess or student not in champion.excess:
        return [f"{student}: was not drawn with both candidate and {name}, so they cannot be compared (gate.steps)"]
    failures = []
    both = (metrics, champion)
    for figure, shown, sign in (("excess", "excess distance", 1), ("retrieval", "caption retrieval", -1)):
        mine, theirs = (getattr(each, figure)[student] for each in both)
        loss = sign * (mine - theirs)
        tolerance = math.hypot(*(_half_width(each.interval_of_seeds(figure, student)) for each in both))
        if not loss <= tolerance:
            failures.append(
                f"{student}: {shown} {mine:.3f} is worse than {name}'s {theirs:.3f} by {loss:.3f}, and chance explains "
                f"{tolerance:.3f}"
            )
    return failures


def _half_width(interval: Interval | None) -> float:
    return (interval[1] - interval[0]) / 2 if interval else 0.0


# What no features enter into.
_COUNTED = (
    *("features", "pictures", "real_pictures", "prompts", "seed", "scores"),
    *("network_evaluations", "baselines", "seconds_per_picture", "latency"),
)


def record(metrics: Metrics) -> dict[str, float]:
    """Returns all numbers of the metrics flat, named as MLflow allows.

    Figures that come from features are named after them, `efficientnet-lite0/320_128px/excess.student_4`, so that
    runs with different features have no figure in common that could be compared.
    """
    made_by = metrics.features.name + "/"
    flat: dict[str, float] = {}
    for key, value in metrics.plain().items():
        flat |= _flat({key: value}, "" if key in _COUNTED else _named(made_by))
    return flat


def _named(key: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", key.replace("+", "p"))


def _flat(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = prefix + _named(key)
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, int | float):
            flat[name] = float(value)
    return flat
