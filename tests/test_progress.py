import pytest

from lcmlora import progress


def test_the_lines_of_a_log_are_read_back(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    track = progress.track(range(2), "distill a: w 4", total=5, completed=3, unit=8)
    track.note(loss=0.25)
    list(track)
    lines = capfd.readouterr().err.splitlines()
    assert [progress.parse_log_line(line) for line in lines] == [("distill a: w 4", 4, 5), ("distill a: w 4", 5, 5)]


@pytest.mark.parametrize("line", ["Running stage 'distill@a':", "error: 3/4 of the pictures", "lr: 1/2", ""])
def test_other_lines_are_no_progress(line: str):
    assert progress.parse_log_line(line) is None
