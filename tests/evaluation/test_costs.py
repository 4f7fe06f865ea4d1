"""The student beside the best solvers at equal evaluations, in equal steps and at equal distance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.evaluation.comparisons.costs import compare_costs, savings
from lcmlora.evaluation.figures import Key, Metrics, Saving

COSTS = {Key(f"{solver}@{n}"): n for solver in ("ddim", "dpm++") for n in (2, 4, 8, 16)}


def saved(student: float, *, evaluations: int = 4, **changes: float) -> Saving:
    """Returns the saving of a student, where DDIM's distance is 100 / N, and DPM-Solver++'s far off or as told."""
    distances = {key: 100 / n if key.method == "ddim" else 1000.0 for key, n in COSTS.items()}
    distances |= {Key(f"dpm++@{name[1:]}"): value for name, value in changes.items()}
    key = Key(f"student@{evaluations}")
    return savings(distances | {key: student}, COSTS | {key: evaluations})[key]


def test_a_saving_is_read_off_the_curve_on_logarithmic_scales() -> None:
    assert saved(10.0).factor == pytest.approx(2.5)  # DDIM comes to 100 / 10 in ten evaluations
    assert saved(20.0, evaluations=1).factor == pytest.approx(5.0)
    assert saved(40.0, evaluations=8).factor == pytest.approx(2.5 / 8)  # the solvers take fewer
    assert (saved(25.0).factor, saved(25.0).relation, saved(25.0).evaluations) == (pytest.approx(1.0), "equal", 4)


def test_at_each_number_of_evaluations_the_nearest_solver_counts() -> None:
    assert saved(10.0, n8=10.0).factor == pytest.approx(2.0)
    # A curve that rises again was as near before.
    assert saved(10.0, n4=10.0).factor == pytest.approx(1.0)


def test_a_distance_that_the_solvers_do_not_come_to_is_a_bound() -> None:
    far = saved(1.0)
    assert (far.factor, far.relation, far.text) == (4.0, "more than", "more than 4")
    near = saved(60.0)
    assert (near.factor, near.relation, near.text) == (0.5, "at most", "at most 0.5")
    assert savings({Key("student@4"): 1.0}, {Key("student@4"): 4}) == {}


def test_the_interval_comes_of_the_same_resamples_and_is_around_the_factor() -> None:
    distances = {key: 100 / n for key, n in COSTS.items()} | {Key("student@4"): 10.0}
    costs = COSTS | {Key("student@4"): 4}
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # All sets move together and lie above their distance, as resampled ones do: only the student's own spread counts.
    shared = {key: value + 50 + 0.01 * noise for key, value in distances.items()}
    (still,) = savings(distances, costs, shared).values()
    assert still.interval and still.interval[1]
    assert still.interval[0] < 2.5 < still.interval[1] < still.interval[0] + 0.02
    (found,) = savings(distances, costs, shared | {Key("student@4"): 10 + noise}).values()
    assert found.interval and found.interval[1]
    # At 10 the curve falls by one in one evaluation, so two deviations of 1 are 2 of 10 evaluations, 0.5 of the factor.
    assert found.interval[0] == pytest.approx(2.5 / 1.2, rel=0.05) and found.interval[1] == pytest.approx(3.1, rel=0.1)
    assert found.text == f"2.5 ({found.interval[0]:.2g} to {found.interval[1]:.2g})"
    (beyond,) = savings(distances, costs, shared | {Key("student@4"): 10 + 4 * noise}).values()
    assert beyond.interval and beyond.interval[1] is None and beyond.text.endswith("to more)")


def metrics(**changes: Any) -> Metrics:
    excess = {"student@4": 10.0, "dpm++@4": 30.0, "ddim@4": 60.0, "dpm++@8": 8.0, "ddim@8": 12.0}
    baselines = {
        Key("dpm++@4"): SolverSettings.of("dpm++", 4, 1.0),
        Key("ddim@4"): SolverSettings.of("ddim", 2, 3.0),
        Key("dpm++@8"): SolverSettings.of("dpm++", 4, 4.0),
        Key("ddim@8"): SolverSettings.of("ddim", 8, 1.0),
    }
    plain = {
        "features": {"name": "quarters/12"},
        "pictures": 20,
        "seed": 0,
        "floor": 5.0,
        "excess": excess,
        "distance_teacher": {key: value + 5 for key, value in excess.items()} | {"teacher": 5.0},
        "retrieval": {"teacher@50": 1.0, "student@4": 1.0},
        "network_evaluations": {key: Key(key).evaluations for key in excess},
        "baselines": {key: value.plain() for key, value in baselines.items()},
    }
    return Metrics.parse(plain | changes, "metrics")


def test_equal_evaluations_equal_steps_and_equal_distance_have_rivals_of_their_own() -> None:
    figures = metrics()
    found = figures.model_copy(update=compare_costs(figures, {}))
    student = Key("student@4")
    assert (found.advantage[student].rival, found.advantage[student].difference) == ("dpm++@4", -20.0)
    # In four steps DPM-Solver++ was drawn unguided and guided: the guided one is nearer, for twice the evaluations.
    steps = found.advantage_at_steps[student]
    assert (steps.rival, steps.network_evaluations, steps.difference) == ("dpm++@8", 8, 2.0)
    assert 1.0 < found.savings[student].factor < 2.0 and found.savings[student].interval is None
    assert Metrics.parse(found.plain(), "metrics") == found


def test_figures_without_baselines_have_no_comparison_in_equal_steps() -> None:
    old = metrics(baselines={})
    assert compare_costs(old, {})["advantage_at_steps"] == {}
