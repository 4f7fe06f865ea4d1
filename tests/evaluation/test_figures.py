"""What evaluations wrote is read as it was written, whichever version wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Gate
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Key, Metrics, Study
from lcmlora.evaluation.gate import gate_failures, record
from lcmlora.evaluation.reference import Reference
from lcmlora.io.documents import Document

FILES = Path(__file__).parent / "files"
OLD = FILES / "metrics-before-intervals.json"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (Metrics, OLD),
        (Metrics, FILES / "metrics-with-latency.json"),
        (Study, FILES / "study.json"),
        (Reference, FILES / "reference.json"),
    ],
    ids=lambda each: each.stem if isinstance(each, Path) else "",
)
def test_a_file_that_is_read_is_written_again_to_the_byte(kind: type[Document], file: Path, tmp_path: Path) -> None:
    kind.read(file).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_the_figures_of_the_first_versions_are_still_to_be_compared() -> None:
    old, new = Metrics.read(OLD), Metrics.read(FILES / "metrics-with-latency.json")
    assert old.features.distance == "frechet" and old.intervals is None and old.latency is None
    assert old.teacher == new.teacher == "teacher@50"
    assert [key.steps for key in old.students] == [1, 2, 4, 8]
    assert old.solvers_at(4) == ["ddim@2", "dpm++@2", "unipc@2"]
    assert new.interval("excess", Key("student@4")) == tuple(new.plain()["intervals"]["excess"]["student@4"])
    assert record(old)["efficientnet-lite0/320_128px/excess.student_4"] == old.excess[Key("student@4")]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((-5.0, (-7.0, -3.0)), (-0.5, (-0.7, -0.2)), "agree"),
        ((5.0, (3.0, 7.0)), (0.5, None), "agree"),
        ((-5.0, (-7.0, -3.0)), (0.5, (0.2, 0.7)), "disagree"),
        ((-5.0, (-7.0, -3.0)), (0.5, (-0.2, 0.7)), "undecided"),
        ((-5.0, (-7.0, 1.0)), (-0.5, (-0.7, -0.2)), "undecided"),
    ],
)
def test_second_features_agree_where_they_rank_the_student_alike_beyond_chance(
    first: tuple[float, Any], second: tuple[float, Any], expected: str
) -> None:
    def found(rival: str, difference: float, interval: Any) -> dict[str, Any]:
        return {"rival": rival, "network_evaluations": 4, "difference": difference, "interval": interval}

    check = {"features": {"name": "second"}, "floor": 1.0, "excess": {}}
    check |= {"advantage": {"student@4": found("ddim@4", *second)}}
    figures = json.loads(OLD.read_text()) | {"advantage": {"student@4": found("dpm++@4", *first)}, "check": check}
    metrics = Metrics.parse(figures, "metrics")
    assert metrics.agreement(Key("student@4")) == expected
    assert metrics.agreement(Key("student@2")) is None


def test_the_number_of_a_solver_is_its_steps_in_old_figures_and_its_evaluations_in_those_with_baselines() -> None:
    old = Metrics.read(OLD)
    assert old.baselines == {} == old.savings
    assert old.label(Key("dpm++@2")) == "DPM-Solver++, 2 steps" and old.steps(Key("dpm++@2")) == 2
    assert old.named(Key("dpm++@2")) == "dpm++@2" and old.network_evaluations[Key("dpm++@2")] == 4
    baseline = SolverSettings.of("dpm++", 1, 3.0, spacing="leading", karras=True, final="sigma_min")
    new = Metrics.parse(old.plain() | {"baselines": {"dpm++@2": baseline.plain()}}, "metrics.json")
    assert new.label(Key("dpm++@2")) == (
        "DPM-Solver++, 2 evaluations (1 step, guidance 3, leading, Karras sigmas, to sigma_min)"
    )
    assert new.steps(Key("dpm++@2")) == 1 and new.label(Key("student@4")) == "student, 4 steps"
    assert [new.count_label(Key(key)) for key in ("dpm++@2", "student@1", "real")] == ["2 evaluations", "1 step", ""]
    assert gate_failures(old, Gate(steps=4, min_retrieval=0.5, min_diversity=0)) == []
    with pytest.raises(UserError, match=r"metrics.json: baselines.dpm\+\+@2.solver: is missing"):
        Metrics.parse(old.plain() | {"baselines": {"dpm++@2": {"steps": 1}}}, "metrics.json")


def test_what_a_later_version_added_is_kept(tmp_path: Path) -> None:
    later = json.loads(OLD.read_text()) | {"sharpness": {"student@4": 0.5}}
    later["features"]["layer"] = "head"
    assert Metrics.parse(later, "metrics.json").plain() == later


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"excess": {"student@4": "low"}}, "metrics.json: excess.student@4: got 'low': expected a number"),
        ({"excess": {"student@4": True}}, "metrics.json: excess.student@4: got True: expected a number"),
        ({"excess": {"student@four": 1.0}}, "metrics.json: excess.student@four: got 'student@four': expected METHOD@"),
        ({"seed": "1"}, "metrics.json: seed: got '1': Input should be a valid integer"),
        ({"features": {"dimensions": 3}}, "metrics.json: features.name: is missing"),
        ({"intervals": [1]}, "metrics.json: intervals: got [1]: "),
    ],
)
def test_what_does_not_fit_is_named_in_one_line_with_file_key_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Metrics.parse(json.loads(OLD.read_text()) | changes, "metrics.json")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part", "method", "number", "label"),
    [
        ("student@4", "", "student", 4, "student, 4 steps"),
        ("alone/dpm++@1", "alone", "dpm++", 1, "DPM-Solver++, 1 step"),
        ("accelerated@2", "", "accelerated", 2, "accelerated, 2 steps"),
        ("real", "", "real", 0, "real"),
    ],
)
def test_a_key_says_what_drew_the_set(text: str, part: str, method: str, number: int, label: str) -> None:
    key = Key(text)
    assert (key, key.part, key.method, key.number, key.label) == (text, part, method, number, label)


def test_a_release_has_what_this_machine_measured_and_what_a_study_found() -> None:
    study = Study.read(FILES / "study.json")
    joined = Metrics.read(OLD).joined(study)
    assert joined.plain() == json.loads(OLD.read_text()) | study.plain()
    assert joined.variations == study.variations
