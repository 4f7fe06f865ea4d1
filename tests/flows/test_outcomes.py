from __future__ import annotations

from pathlib import Path

import pytest

from lcmlora.evaluation.figures import Metrics
from lcmlora.flows import outcomes
from lcmlora.flows.outcomes import Outcome, _figures, packaged, rows
from tests.support.reports import searched


def test_the_runs_table_names_the_solvers_settings_the_saving_and_the_second_features() -> None:
    rows = dict(_figures(Metrics.parse(searched(), "metrics"), 4))
    assert rows == {
        "excess at 4 evaluations": "student 81.0, best solver 290.0 (dpm++@4: 4 steps, unguided)",
        "the same distance": "takes solvers 2.1 (1.9 to 2.4) times as many evaluations",
        "second features": "rank both alike",
        "retrieval@1": "student@4 0.400, teacher@50 0.400",
    }


def test_a_run_whose_results_were_not_sent_says_so_unless_something_worse_happened() -> None:
    promoted, unsent = Outcome("a", created=True, promoted=True), "dvc push: Access Denied"
    assert outcomes.end([promoted]) == "Promoted"
    promoted.not_pushed = unsent
    assert promoted.end == "Promoted" and outcomes.end([promoted]) == "NotPushed"
    assert ("not pushed", f"{unsent}; {outcomes.NOT_PUSHED}") in outcomes.rows(promoted, 4)
    assert outcomes.end([promoted, Outcome("b", created=True, gate_failures=["x"], not_pushed=unsent)]) == "Rejected"
    assert outcomes.end([promoted, Outcome("b", errors=["x"], not_pushed=unsent)]) == "Failed"


def test_the_page_of_a_run_that_failed_before_packaging_has_no_card_of_an_earlier_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    card = Path("release/mini/README.md")
    card.parent.mkdir(parents=True)
    card.write_text("of last night")
    assert packaged(Outcome("mini", errors=["distill@mini: out of memory"])) is None
    assert packaged(Outcome("mini", figures=Metrics.parse(searched(), "metrics"))) == card.parent


def test_a_version_that_was_deleted_and_what_was_changed_meanwhile_are_in_the_table() -> None:
    outcome = Outcome("mini", version="lcm-lora-mini/3", deleted=True, changed=["params.yaml"])
    assert rows(outcome, 4) == [
        ("ran", "nothing"),
        (
            "version",
            "lcm-lora-mini/3 was deleted in MLflow: not registered again (`lcmlora registry readmit mini` allows it)",
        ),
        ("changed", "while it ran: params.yaml"),
    ]
