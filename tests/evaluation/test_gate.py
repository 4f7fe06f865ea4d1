from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from lcmlora.config import Gate
from lcmlora.evaluation.gate import gate, record

GATE = Gate(steps=4, min_retrieval=0.8)
METRICS: dict[str, Any] = {
    "features": {"name": "efficientnet-lite0/320@128px", "dimensions": 320},
    "pictures": 512,
    "excess": {"teacher": 0.0, "ddim@2": 60.0, "dpm++@2": 40.0, "dpm++@4": 5.0, "student@2": 30.0, "student@4": 12.0},
    "distance_real": None,
    "retrieval": {"teacher@50": 0.75, "student@2": 0.5, "student@4": 0.625, "ddim@2": 0.25},
    "network_evaluations": {
        "teacher@50": 100, "ddim@2": 4, "dpm++@2": 4, "dpm++@4": 8, "student@2": 2, "student@4": 4,
    },
}  # fmt: skip


def changed(group: str, key: str, value: float) -> dict[str, Any]:
    metrics = copy.deepcopy(METRICS)
    metrics[group][key] = value
    return metrics


def test_a_student_that_beats_the_solvers_at_equal_cost_passes() -> None:
    assert gate(METRICS, GATE) == []  # dpm++@4 is closer, and costs twice as much


def test_a_student_no_better_than_one_solver_fails_naming_it_and_the_difference() -> None:
    (line,) = gate(changed("excess", "student@4", 43.5), GATE)
    assert "student@4" in line and "43.50 is not below dpm++@2's 40.00" in line and "3.50 too high" in line
    assert len(gate(changed("excess", "student@4", 60.0), GATE)) == 2
    assert len(gate(changed("excess", "student@4", float("nan")), GATE)) == 2


def test_low_caption_retrieval_fails_with_what_was_needed() -> None:
    (line,) = gate(changed("retrieval", "student@4", 0.5), GATE)
    assert "0.500 is below 0.600" in line and "teacher@50" in line and "0.100 too low" in line


def test_nothing_to_compare_with_is_a_failure_and_not_a_pass() -> None:
    (line,) = gate(changed("network_evaluations", "student@4", 6), GATE)
    assert "no solver" in line and "add 3 to evaluation.solver_steps" in line
    (line,) = gate(METRICS, Gate(steps=8, min_retrieval=0.8))
    assert line.startswith("student@8: was not drawn") and "student@2, student@4" in line


def test_recorded_names_are_those_that_mlflow_takes() -> None:
    flat = record(METRICS)
    made_by = "efficientnet-lite0/320_128px/"
    assert flat[made_by + "excess.student_4"] == 12.0 and flat[made_by + "excess.dpmpp_2"] == 40.0
    assert flat["pictures"] == 512.0 and flat["network_evaluations.student_4"] == 4.0
    assert all(re.fullmatch(r"[\w\-./ :]+", name) for name in flat)
    assert not any(name.startswith((made_by + "distance_real", "features.name")) for name in flat)
    with pytest.raises(KeyError):
        flat["features.name"]
