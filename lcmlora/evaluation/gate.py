"""What the figures of an evaluation decide, and the names under which they are logged."""

from __future__ import annotations

import re
from typing import Any

from lcmlora.config import Gate


def gate(metrics: dict[str, Any], gate: Gate) -> list[str]:
    """Returns why a candidate with these metrics must not become champion, a line for each reason; empty if it may.

    The student at `gate.steps` must have a smaller excess over the teacher's floor than every solver at as many network
    evaluations, and at least `gate.min_retrieval` of the teacher's caption retrieval.
    """
    student, excess, cost = f"student@{gate.steps}", metrics["excess"], metrics["network_evaluations"]
    if student not in excess:
        drawn = ", ".join(name for name in excess if name.startswith("student@"))
        return [f"{student}: was not drawn (gate.steps); evaluation.student_steps gave {drawn or 'nothing'}"]
    failures = []
    rivals = [n for n in excess if not n.startswith(("student@", "teacher")) and cost[n] == cost[student]]
    if not rivals:
        failures.append(
            f"{student}: no solver was drawn at its {cost[student]} network evaluations, so nothing was beaten; "
            f"add {cost[student] / 2:g} to evaluation.solver_steps or change gate.steps"
        )
    for rival in rivals:
        if not excess[student] < excess[rival]:  # written so that a NaN fails
            failures.append(
                f"{student}: excess Frechet distance {excess[student]:.2f} is not below {rival}'s {excess[rival]:.2f} "
                f"at {cost[student]} network evaluations: {excess[student] - excess[rival]:.2f} too high"
            )
    teacher = next(name for name in metrics["retrieval"] if name.startswith("teacher@"))
    reached, needed = metrics["retrieval"][student], gate.min_retrieval * metrics["retrieval"][teacher]
    if not reached >= needed:
        failures.append(
            f"{student}: caption retrieval {reached:.3f} is below {needed:.3f} ({gate.min_retrieval:g} of {teacher}'s "
            f"{metrics['retrieval'][teacher]:.3f}): {needed - reached:.3f} too low"
        )
    return failures


# What no features enter into.
_COUNTED = (
    *("features", "pictures", "real_pictures", "prompts", "seed", "scores"),
    *("network_evaluations", "seconds_per_picture", "latency"),
)


def record(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns all numbers of the metrics flat, named as MLflow allows.

    Figures that come from features are named after them, `efficientnet-lite0/320_128px/excess.student_4`, so that
    runs with different features have no figure in common that could be compared.
    """
    made_by = metrics["features"]["name"] + "/"
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        flat |= _flat({key: value}, "" if key in _COUNTED else _named(made_by))
    return flat


def _named(key: str) -> str:
    return re.sub(r"[^\w\-./ :]", "_", key.replace("+", "p"))


def _flat(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = prefix + _named(key)
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, int | float):
            flat[name] = float(value)
    return flat
