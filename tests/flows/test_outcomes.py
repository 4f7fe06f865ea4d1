from __future__ import annotations

from lcmlora.evaluation.figures import Metrics
from lcmlora.flows.outcomes import _figures
from tests.support.reports import searched


def test_the_runs_table_names_the_solvers_settings_the_saving_and_the_second_features() -> None:
    rows = dict(_figures(Metrics.parse(searched(), "metrics"), 4))
    assert rows == {
        "excess at 4 evaluations": "student 81.0, best solver 290.0 (dpm++@4: 4 steps, unguided)",
        "the same distance": "takes solvers 2.1 (1.9 to 2.4) times as many evaluations",
        "second features": "rank both alike",
        "retrieval@1": "student@4 0.400, teacher@50 0.400",
    }
