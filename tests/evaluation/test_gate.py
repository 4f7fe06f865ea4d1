from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from lcmlora.config import Gate
from lcmlora.evaluation import gate as decisions
from lcmlora.evaluation.figures import Key, Metrics

GATE = Gate(steps=4, min_retrieval=0.8)
METRICS: dict[str, Any] = {
    "features": {"name": "efficientnet-lite0/320@128px", "dimensions": 320},
    "pictures": 512,
    "seed": 1000,
    "floor": 20.0,
    "excess": {"teacher": 0.0, "ddim@2": 60.0, "dpm++@2": 40.0, "dpm++@4": 5.0, "student@2": 30.0, "student@4": 12.0},
    "distance_real": None,
    "retrieval": {"teacher@50": 0.75, "student@2": 0.5, "student@4": 0.625, "ddim@2": 0.25},
    "network_evaluations": {
        "teacher@50": 100, "ddim@2": 4, "dpm++@2": 4, "dpm++@4": 8, "student@2": 2, "student@4": 4,
    },
}  # fmt: skip


def gate(metrics: dict[str, Any], settings: Gate) -> list[str]:
    return decisions.gate_failures(Metrics.parse(metrics, "metrics"), settings)


def against(metrics: dict[str, Any], champion: dict[str, Any], settings: Gate, name: str) -> list[str]:
    return decisions.against(Metrics.parse(metrics, "metrics"), Metrics.parse(champion, "champion"), settings, name)


def incomparable(metrics: dict[str, Any], champion: dict[str, Any]) -> str | None:
    return decisions.incomparable(Metrics.parse(metrics, "metrics"), Metrics.parse(champion, "champion"))


def record(metrics: dict[str, Any]) -> dict[str, float]:
    return decisions.record(Metrics.parse(metrics, "metrics"))


def changed(group: str, key: str, value: float) -> dict[str, Any]:
    metrics = copy.deepcopy(METRICS)
    metrics[group][key] = value
    return metrics


def test_a_student_that_beats_the_solvers_at_equal_cost_passes() -> None:
    assert gate(METRICS, GATE) == []  # dpm++@4 is closer, and costs twice as much


def test_each_number_of_steps_is_asked_what_the_gate_asks_of_its_own() -> None:
    figures = Metrics.parse(METRICS, "metrics")
    found = decisions.by_steps(figures, GATE)
    assert found == {2: gate(METRICS, GATE.model_copy(update={"steps": 2})), 4: []}
    assert found[2] and all(reason.startswith("student@2: ") for reason in found[2])
    assert decisions.by_steps(figures, GATE.model_copy(update={"max_excess": 1.0}))[4]


def test_a_student_no_better_than_one_solver_fails_naming_it_and_the_difference() -> None:
    (line,) = gate(changed("excess", "student@4", 43.5), GATE)
    assert "student@4" in line and "43.50 is not below dpm++@2's 40.00" in line and "3.50 too high" in line
    assert len(gate(changed("excess", "student@4", 60.0), GATE)) == 2
    assert len(gate(changed("excess", "student@4", float("nan")), GATE)) == 2


def test_low_caption_retrieval_fails_with_what_was_needed() -> None:
    (line,) = gate(changed("retrieval", "student@4", 0.5), GATE)
    assert "0.500 is below 0.600" in line and "teacher@50" in line and "0.100 too low" in line


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (changed("retrieval", "teacher@50", 0.0), "teacher@50 meets none of its captions"),
        (changed("retrieval", "teacher@50", float("nan")), "teacher@50 meets none of its captions"),
        (METRICS | {"prompts": 1}, "there is one caption, which every picture has"),
    ],
)
def test_retrieval_that_says_nothing_is_not_measured_and_does_not_pass(metrics: dict[str, Any], reason: str) -> None:
    (line,) = gate(metrics, GATE)
    assert f"student@4: caption retrieval was not measured: {reason}" in line and "gate.min_retrieval to 0" in line
    measured = metrics["retrieval"]["teacher@50"] >= 0  # a NaN never passes
    assert bool(gate(metrics, Gate(steps=4, min_retrieval=0))) != measured


def led(interval: list[float] | None, captions: int | None = 32) -> dict[str, Any]:
    """Returns the figures with an interval of the student's lead over the best solver."""
    intervals = {"level": 0.95, "resamples": 1000, "captions": captions, "excess": {}, "retrieval": {}}
    lead = {"rival": "dpm++@2", "network_evaluations": 4, "difference": -28.0, "interval": interval}
    return METRICS | {"prompts": captions, "intervals": intervals, "advantage": {"student@4": lead}}


def test_a_lead_that_other_captions_or_seeds_may_undo_fails_unless_chance_is_allowed() -> None:
    assert gate(led([-50.0, -6.0]), GATE) == [] == gate(led(None), GATE)
    (line,) = gate(led([-60.0, 4.0]), GATE)
    assert "lead of 28.00 over dpm++@2 may be chance: the difference is between -60.00 and 4.00" in line
    assert "(95% interval, 512 pictures of 32 captions)" in line
    assert gate(led([-60.0, 4.0]), Gate(steps=4, beyond_chance=False)) == []
    (line,) = gate(led([-60.0, 4.0]) | {"excess": METRICS["excess"] | {"student@4": 43.5}}, GATE)
    assert "is not below dpm++@2's 40.00" in line  # said once


def test_a_lead_on_one_caption_says_nothing_of_others() -> None:
    (line,) = gate(led([-50.0, -6.0], captions=1), Gate(steps=4, min_retrieval=0))
    assert "it was compared on one caption, which says nothing of others" in line


DIVERSE = METRICS | {"prompts": 32, "diversity": {"teacher@50": 0.5, "student@4": 0.44, "student@2": 0.3}}


def test_seeds_that_draw_much_the_same_fail_with_what_was_needed() -> None:
    assert gate(DIVERSE, GATE) == []
    (line,) = gate(DIVERSE, Gate(steps=4, min_diversity=0.9))
    assert "diversity of seeds 0.440 is below 0.450 (0.9 of teacher@50's 0.500): 0.010 too low" in line
    assert gate(DIVERSE, Gate(steps=4, min_diversity=0)) == []
    (line,) = gate(DIVERSE | {"diversity": {"teacher@50": 0.5, "student@4": float("nan")}}, GATE)
    assert "diversity of seeds nan is below 0.425" in line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompts": 512, "diversity": {}}, "each caption has one picture"),
        ({"diversity": {}}, "the figures have none"),
        ({"diversity": {"teacher@50": 0.0, "student@4": 0.1}}, "teacher@50 draws the same picture from all seeds"),
    ],
)
def test_diversity_that_cannot_be_measured_is_not_asked_for_and_says_why(changes: dict[str, Any], reason: str) -> None:
    assert gate(DIVERSE | changes, Gate(steps=4, min_diversity=1.0)) == []
    figures = Metrics.parse(DIVERSE | changes, "metrics")
    assert decisions.unmeasured_diversity(figures, Key("student@4")) == reason


def test_nothing_to_compare_with_is_a_failure_and_not_a_pass() -> None:
    (line,) = gate(changed("network_evaluations", "student@4", 6), GATE)
    assert "no solver" in line and "add 6 to evaluation.solver_evaluations" in line
    (line,) = gate(METRICS, Gate(steps=8, min_retrieval=0.8))
    assert line.startswith("student@8: was not drawn") and "gave student@2, student@4; add 8 to them" in line


def test_at_one_step_a_guided_solver_cannot_be_met_and_the_advice_says_so() -> None:
    one = {group: METRICS[group] | {"student@1": value} for group, value in (("excess", 20.0), ("retrieval", 0.7))}
    costs = METRICS["network_evaluations"] | {"student@1": 1}
    (line,) = gate(METRICS | one | {"network_evaluations": costs}, Gate(steps=1))
    assert line.endswith(
        "no solver was drawn at its 1 network evaluations, so nothing was beaten; add 1 to "
        "evaluation.solver_evaluations (with a solver of guidance scale 1, since a guided step costs two), or change "
        "gate.steps"
    )


def test_recorded_names_are_those_that_mlflow_takes() -> None:
    flat = record(METRICS)
    made_by = "efficientnet-lite0/320_128px/"
    assert flat[made_by + "excess.student_4"] == 12.0 and flat[made_by + "excess.dpmpp_2"] == 40.0
    assert flat["pictures"] == 512.0 and flat["network_evaluations.student_4"] == 4.0
    assert all(re.fullmatch(r"[\w\-./ :]+", name) for name in flat)
    assert not any(name.startswith((made_by + "distance_real", "features.name")) for name in flat)
    with pytest.raises(KeyError):
        flat["features.name"]


def test_an_absolute_bound_on_the_excess_names_both_numbers() -> None:
    bounded = GATE.model_copy(update={"max_excess": 10.0})
    (line,) = gate(METRICS, bounded)
    assert "12.00 is above 10.00" in line and "2.00 too high" in line
    assert gate(METRICS, GATE.model_copy(update={"max_excess": 12.0})) == []
    assert len(gate(changed("excess", "student@4", float("nan")), bounded)) == 3


def test_the_champion_is_met_unless_a_figure_is_worse_by_more_than_chance_explains() -> None:
    chance = {
        "level": 0.95,
        "resamples": 200,
        "excess": {"student@4": [9.0, 15.0]},
        "retrieval": {"student@4": [0.6, 0.65]},
    }
    champion = METRICS | {"intervals": chance}
    name = "lcm-lora-mini/3"
    assert against(champion, champion, GATE, name) == []
    worse = changed("excess", "student@4", 12.0 + 4.2) | {"intervals": chance}  # sqrt(3^2 + 3^2) is 4.24
    assert against(worse, champion, GATE, name) == []
    worse["excess"]["student@4"] = 12.0 + 4.3
    (line,) = against(worse, champion, GATE, name)
    assert "excess distance 16.300 is worse than lcm-lora-mini/3's 12.000 by 4.300" in line
    assert line.endswith("chance explains 4.243")
    (line,) = against(changed("retrieval", "student@4", 0.6), METRICS, GATE, name)  # no intervals: any loss
    assert "caption retrieval 0.600 is worse than lcm-lora-mini/3's 0.625 by 0.025" in line
    assert len(against(changed("excess", "student@4", float("nan")), champion, GATE, name)) == 1
    (line,) = against(METRICS, champion, GATE.model_copy(update={"steps": 8}), name)
    assert line.startswith("student@8: was not drawn")


def test_figures_of_other_features_or_another_reference_are_not_comparable() -> None:
    mine = METRICS | {"reference_digest": "a"}
    assert incomparable(mine, copy.deepcopy(mine)) is None
    assert "reference_digest" in str(incomparable(mine, mine | {"reference_digest": "b"}))
    assert "its features are efficientnet-lite0" in str(incomparable(mine, changed("features", "name", "inception")))
