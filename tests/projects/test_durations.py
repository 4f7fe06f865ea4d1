"""How long stages took, as `timings/stages.json` keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcmlora.project import Project
from lcmlora.projects import durations

ENTRY = "models.owls.distill"


def test_a_stage_that_ended_well_is_kept_with_the_parts_that_ended_in_an_error(tmp_path: Path):
    project = Project(tmp_path)
    assert durations.read(project).seconds == {}
    durations.Durations(unfinished={ENTRY: 100.0}).write(project.durations)
    with pytest.raises(KeyboardInterrupt), durations.measured(project, ENTRY):
        raise KeyboardInterrupt
    assert durations.read(project).seconds == {} and durations.read(project).unfinished[ENTRY] >= 100.0
    with durations.measured(project, ENTRY):
        pass
    found = durations.read(project)
    assert found.seconds[ENTRY] >= 100.0 and found.unfinished == {}
    with durations.measured(project, ENTRY):
        pass
    assert durations.read(project).seconds[ENTRY] < 100.0  # of the last run alone


def test_a_launcher_that_ends_with_status_0_has_ended_well(tmp_path: Path):
    project = Project(tmp_path)
    for status in (0, 1):
        with pytest.raises(SystemExit), durations.measured(project, f"models.owls.{status}"):
            raise SystemExit(status)
    found = durations.read(project)
    assert (list(found.seconds), list(found.unfinished)) == (["models.owls.0"], ["models.owls.1"])


def test_of_processes_that_train_together_the_first_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    with durations.measured(Project(tmp_path), ENTRY):
        pass
    assert not Project(tmp_path).durations.exists()


def test_a_damaged_file_costs_no_stage_its_result(tmp_path: Path, capsys: pytest.CaptureFixture):
    project = Project(tmp_path)
    project.durations.parent.mkdir()
    project.durations.write_text("{")
    with durations.measured(project, ENTRY):
        pass
    assert list(durations.read(project).seconds) == [ENTRY]
    assert capsys.readouterr().err.startswith(f"warning: {project.durations}: not JSON")
