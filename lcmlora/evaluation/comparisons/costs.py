"""The student beside the best solvers: at equal network evaluations, in equal steps, and at equal distance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcmlora.evaluation.figures import STUDENT, TEACHER, Advantage, Key, Metrics, Saving
from lcmlora.evaluation.measures.bootstrap import interval


def compare_costs(metrics: Metrics, spread: Mapping[Key, Tensor]) -> dict[str, object]:
    """Returns the comparisons as fields of Metrics.

    Args:
        spread: the excess (R,) of every set in R resamples; empty if there are none.
    """
    costs, steps = metrics.network_evaluations, {key: metrics.steps(key) for key in metrics.excess}
    distances = {key: value for key, value in metrics.distance_teacher.items() if key != TEACHER}
    return {
        "advantage": advantages(metrics, costs, spread),
        # Of figures without baselines the steps are those of guided solvers alone.
        "advantage_at_steps": advantages(metrics, steps, spread) if metrics.baselines else {},
        "savings": savings(distances, costs, spread),
    }


def advantages(metrics: Metrics, costs: Mapping[Key, int], spread: Mapping[Key, Tensor]) -> dict[Key, Advantage]:
    """Returns the student's excess less the best solver's at equal cost: network evaluations or steps."""
    found = {}
    for key in metrics.students:
        rivals = [each for each in metrics.excess if each.is_solver and costs.get(each) == costs[key]]
        if rivals:
            rival = min(rivals, key=metrics.excess.__getitem__)
            difference = metrics.excess[key] - metrics.excess[rival]
            found[key] = Advantage(
                rival=rival,
                network_evaluations=metrics.network_evaluations[rival],
                difference=difference,
                interval=interval(spread[key] - spread[rival], difference) if spread else None,
            )
    return found


def savings(
    distances: Mapping[Key, float], evaluations: Mapping[Key, int], resampled: Mapping[Key, Tensor] | None = None
) -> dict[Key, Saving]:
    """Returns how many times fewer evaluations every student takes than the solvers for its distance, by its key.

    At each number of evaluations the nearest of all solvers counts. Between these points distance and evaluations are
    interpolated on logarithmic scales, where such curves are close to straight. The first point of the curve that is
    as near as the student decides, which is to the solvers' advantage where their curve rises again. There is no
    saving where there are no solvers.

    Args:
        distances: of students and solvers to the teacher.
        evaluations: network evaluations for one picture.
        resampled: the distances or excesses (R,) in R bootstrap resamples, the same ones for all sets; without them
            there are no intervals. Only their spread counts: they are moved so that their mean is the distance.
    """
    students = sorted((key for key in distances if key.method == STUDENT), key=evaluations.__getitem__)
    solvers = [key for key in distances if key.is_solver]
    if not solvers:
        return {}
    counts = sorted({evaluations[key] for key in solvers})

    def curve(values: Mapping[Key, Tensor]) -> Tensor:
        return torch.stack([torch.stack([values[s] for s in solvers if evaluations[s] == n]).amin(0) for n in counts])

    exact = {key: torch.tensor([value], dtype=torch.float64) for key, value in distances.items()}
    moved = {key: value.double() - value.double().mean() + distances[key] for key, value in (resampled or {}).items()}
    found = {}
    for key in students:
        needed = _evaluations_at(curve(exact), counts, exact[key]).item() / evaluations[key]
        ends = None
        if moved:
            samples = _evaluations_at(curve(moved), counts, moved[key]) / evaluations[key]
            low, high = (_quantile(samples, share) for share in (0.025, 0.975))
            ends = (min(low, counts[-1] / evaluations[key]), high if high != torch.inf else None)
        relation = "at most" if needed == counts[0] / evaluations[key] else "equal"
        found[key] = Saving(
            evaluations=evaluations[key],
            factor=min(needed, counts[-1] / evaluations[key]),
            relation="more than" if needed == torch.inf else relation,  # type: ignore[arg-type]
            interval=ends,
        )
    return found


def _evaluations_at(curve: Tensor, counts: list[int], distance: Tensor) -> Tensor:
    """Returns the evaluations (R,) at which a curve (C, R) first comes down to a distance (R,).

    Infinite where it does not, and the first of the `counts` (C,) where it begins below.
    """
    tiny = torch.finfo(torch.float64).tiny  # a distance of equal sets is zero, or rounded below
    y, target = curve.clamp(min=tiny).log(), distance.clamp(min=tiny).log()
    x = torch.tensor(counts, dtype=torch.float64).log()
    found = torch.full_like(target, torch.inf)
    for i in reversed(range(1, len(counts))):
        reached = (y[i] <= target) & (y[i - 1] > target)
        share = (y[i - 1] - target) / (y[i - 1] - y[i])
        found = torch.where(reached, (x[i - 1] + share * (x[i] - x[i - 1])).exp(), found)
    return torch.where(y[0] <= target, float(counts[0]), found)


def _quantile(samples: Tensor, share: float) -> float:
    """Returns a sample: between two, one of which is infinite, there is no mean."""
    return samples.sort().values[round(share * (len(samples) - 1))].item()
