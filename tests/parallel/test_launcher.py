"""Starting many processes and ending them: real ones, which do what each test asks of them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcmlora.config import Launch
from lcmlora.errors import UserError
from lcmlora.parallel import launcher
from tests.support.repositories import alive

ROOT = Path(__file__).parents[2]
RUN = "0123456789abcdef"


def _start(folder: Path, *acts: str, machines: int = 1, place: str = "", **environment: str) -> subprocess.Popen[str]:
    settings = f"processes={len(acts) // machines}, machines={machines}, rendezvous={place or None!r}"
    script = "import sys; from lcmlora.cli.shell.reporting import reporting_errors\n"
    script += "from lcmlora.config import Launch; from lcmlora.parallel.launcher import launch\n"
    script += "with reporting_errors():\n"
    script += f"  sys.exit(launch(Launch({settings}), 'tests.support.rank', sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), *acts],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _pids(folder: Path, count: int) -> list[int]:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if all((folder / str(rank)).exists() for rank in range(count)):
            return [int((folder / str(rank)).read_text()) for rank in range(count)]
        time.sleep(0.05)
    pytest.fail("they do not start")


@pytest.mark.parametrize(
    ("acts", "status", "line"),
    [
        (("0", "0", "0"), 0, ""),
        (("wait", "wrong", "wait"), 2, "error: process 1: distill.batch: is too much\n"),
        (("wait", "7"), 7, "process 1 ended with status 7, and the others were ended\n"),
        (("wait", "killed"), 137, "process 1 was ended by SIGKILL, and the others were ended\n"),
        # What began it, not what followed: a process that misses another one ends before that one's end is seen.
        (("left", "killed", "left"), 137, "process 1 was ended by SIGKILL, and the others were ended\n"),
    ],
)
def test_one_that_fails_ends_the_others_with_its_status_and_one_line(
    tmp_path: Path, acts: tuple[str, ...], status: int, line: str
):
    launched = _start(tmp_path, *acts)
    _, told = launched.communicate(timeout=60)
    told = re.sub(r"; probably for lack of memory [^\n]*", "", told)  # what a SIGKILL mostly comes from
    assert (launched.returncode, told) == (status, line)
    # One that was ended early has not told its number.
    assert not any(alive(int(path.read_text())) for path in tmp_path.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_told_in_the_status(tmp_path: Path, number: signal.Signals):
    launched = _start(tmp_path, "wait", "stubborn")
    pids = _pids(tmp_path, 2)
    launched.send_signal(number)
    launched.communicate(timeout=60)
    assert launched.returncode == 128 + number
    assert not any(map(alive, pids))


@pytest.mark.parametrize("place", ["host", "host:", ":29400", "host:0", "host:99999", "host:http"])
def test_a_place_to_meet_has_a_host_and_a_port(place: str):
    with pytest.raises(UserError, match="is not host:port"):
        launcher.host_and_port(place)


def test_several_machines_need_a_run_id_that_cannot_be_guessed(monkeypatch: pytest.MonkeyPatch):
    for value in ("", "lcmlora", "x" * 15, "x" * 20 + "/"):
        monkeypatch.setenv(launcher.RUN, value)
        with pytest.raises(UserError, match=r"LCMLORA_RUN_ID: .*openssl rand -hex 16"):
            launcher.launch(Launch(machines=2, rendezvous="127.0.0.1:9"), "tests.support.rank", [])


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("acts", "statuses", "line"),
    [
        (("0", "0"), {0}, ""),
        pytest.param(
            *(("wait", "7"), {1, 7}),
            "on another machine: process 0 ended with status 7, and the others were ended\n",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_machines_meet_and_end_together(tmp_path: Path, acts: tuple[str, ...], statuses: set[int], line: str):
    place = f"127.0.0.1:{_free_port()}"
    both = [_start(tmp_path, *acts, machines=2, place=place, LCMLORA_RUN_ID=RUN) for _ in range(2)]
    told = [launched.communicate(timeout=120)[1] for launched in both]
    assert {launched.returncode for launched in both} == statuses
    assert not line or line in told
    assert not any(alive(pid) for pid in _pids(tmp_path, 2))


def test_another_run_at_the_same_place_is_not_joined(monkeypatch: pytest.MonkeyPatch):
    place = f"127.0.0.1:{_free_port()}"
    monkeypatch.setenv(launcher.RUN, RUN)
    monkeypatch.setattr(launcher, "_JOIN_TIMEOUT", 1.0)
    with pytest.raises(UserError, match=rf"1 of 2 machines came to {place}"):
        launcher.launch(Launch(machines=2, rendezvous=place), "tests.support.rank", [])
