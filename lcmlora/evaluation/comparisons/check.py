"""The same image sets by second features: whether the student's rank hangs on the features that it was measured by."""

from __future__ import annotations

from torch import Tensor

from lcmlora.evaluation.figures import AGAIN, REAL, Advantage, Check, FeatureSet, Key, Metrics
from lcmlora.evaluation.measures.bootstrap import Bootstrap, interval
from lcmlora.evaluation.measures.distances import distance, named


def measure_check(
    features: FeatureSet, sets: dict[Key, Tensor], metrics: Metrics, bootstrap: Bootstrap | None
) -> Check:
    """Returns the figures of all sets by their second features.

    The rival of a student is here the best solver by these features, so that a solver which the first features place
    behind is not left out.

    Args:
        features: the second ones.
        sets: their vectors (N, D) of the sets that the metrics are about, the teacher's second set among them, and of
            the real pictures where there are any.
        metrics: by the first features.
        bootstrap: of the drawn pictures; without one there are no intervals.
    """
    kind, teacher, again = features.distance, metrics.teacher, Key(metrics.teacher + AGAIN)
    compared = {key: value for key, value in sets.items() if key not in (teacher, again, REAL)}
    floor = distance(sets[teacher], sets[again], kind)
    excess = {key: distance(sets[teacher], value, kind) - floor for key, value in compared.items()}
    rivals = {}
    for student in metrics.students:
        if solvers := [key for key in metrics.solvers_at(metrics.network_evaluations[student]) if key in excess]:
            rivals[student] = min(solvers, key=excess.__getitem__)
    judged = {key: compared[key] for key in {*rivals, *rivals.values()}}
    spread = bootstrap.excess(sets[teacher], sets[again], judged, kind) if bootstrap and judged else {}
    advantage = {}
    for student, rival in rivals.items():
        difference = excess[student] - excess[rival]
        advantage[student] = Advantage(
            rival=rival,
            network_evaluations=metrics.network_evaluations[student],
            difference=difference,
            interval=interval(spread[student] - spread[rival], difference) if spread else None,
        )
    return Check(
        features=features,
        floor=floor,
        excess=excess,
        distance_real=_distances_real(sets, kind, features.dimensions),
        advantage=advantage,
    )


def _distances_real(sets: dict[Key, Tensor], kind: str, dimensions: int) -> dict[Key, float] | None:
    """Returns the distance of every set to the real pictures; None where there are none, or too few."""
    real = sets.get(Key(REAL))
    if real is None or len(real) < named(kind).pictures_needed(dimensions):
        return None
    drawn = {key: value for key, value in sets.items() if key != REAL and not key.endswith(AGAIN)}
    return {key: distance(real, value, kind) for key, value in drawn.items()}
