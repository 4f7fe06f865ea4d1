"""What each number of steps is good for, as card and report show it."""

from __future__ import annotations

from dataclasses import dataclass

from lcmlora.evaluation.figures import STUDENT, Key, Metrics
from lcmlora.evaluation.gate import unmeasured_diversity, unmeasured_retrieval
from lcmlora.releases.bundle import Decision


@dataclass(frozen=True)
class StepCount:
    """The student in one number of steps. Shares are of the teacher's figure; None where it was not measured."""

    key: Key
    excess: float
    retrieval: float | None
    diversity: float | None
    reason: str | None  # why it is not within the gate; None where it is


def step_counts(figures: Metrics, gate: Decision | None) -> list[StepCount]:
    """Returns the student in each of its numbers of steps; nothing where the gate looked at one alone."""
    found = []
    for number, failures in (gate.by_steps or {} if gate else {}).items():
        key, teacher = Key.of(STUDENT, int(number)), figures.teacher
        retrieval = None if unmeasured_retrieval(figures) else figures.retrieval[key] / figures.retrieval[teacher]
        diversity = None
        if not unmeasured_diversity(figures, key):
            diversity = figures.diversity[key] / figures.diversity[teacher]
        found.append(StepCount(key, figures.excess[key], retrieval, diversity, _shortened(key, failures)))
    return sorted(found, key=lambda each: each.key.steps)


def _shortened(key: Key, failures: list[str]) -> str | None:
    """Returns the first reason, and how many more there are."""
    if not failures:
        return None
    more = len(failures) - 1
    return failures[0].removeprefix(f"{key}: ") + (f"; and {more} more" if more else "")
