import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lcmlora.tasks import supervisor
from lcmlora.tasks.processes import Command, Ended, Processes, reason, stream
from tests.support.repositories import alive

ROOT = Path(__file__).parents[2]

# What DVC does: it starts the trainer, which a launcher moved to a session of its own, and waits.
DVC = "setsid sh -c 'echo $$ > trainer.part; mv trainer.part trainer; exec sleep 60' & wait"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(script: str) -> Command:
    return Command(["sh", "-c", script])


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def pid(name: str) -> int:
    wait_for(Path(name).exists)
    return int(Path(name).read_text())


def run_flow(script: str) -> subprocess.Popen[bytes]:
    """Starts a process that does what a flow does."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", "from lcmlora.tasks.processes import *\n" + script], env=environment)


def test_the_status_of_a_command_and_the_lines_that_matter_are_returned():
    with Processes() as processes:
        status, lines = stream(processes, shell("echo 'error: no'; echo more; printf last; exit 7"))
        assert (status, lines) == (7, ["error: no", "more", "last"])
        assert stream(processes, shell("kill -9 $$"))[0] == 128 + signal.SIGKILL


def test_the_reason_is_an_error_line_else_the_signal_else_the_last_line_else_the_status():
    assert reason(["error: the disk is full", "ERROR: failed to reproduce", "> step"], 137) == "the disk is full"
    assert reason(["ERROR: failed to reproduce", "> step"], 255) == "failed to reproduce"
    assert reason(["> step"], 128 + signal.SIGTERM) == reason(["> step"], -signal.SIGTERM) == "was ended by SIGTERM"
    assert reason(["> step"], -signal.SIGKILL).startswith("was ended by SIGKILL, probably for lack of memory")
    assert reason(["> step", ""], 1) == "> step"
    assert reason([""], 255) == "ended with status 255"


def test_every_line_is_heard_and_of_one_that_was_written_over_the_last_state():
    heard: list[str] = []
    with Processes() as processes:
        stream(processes, shell(r"printf ' 10%%\r 50%%\r100%% \ndone\n\033[1mbold\033[0m\n'"), listen=heard.append)
    assert heard == ["100%", "done", "bold"]


def test_lines_of_several_commands_are_told_apart(capfd: pytest.CaptureFixture):
    with Processes(several=True) as processes:
        stream(processes, shell("echo one; echo two"), label="encode@a")
    assert capfd.readouterr().err == "encode@a: one\nencode@a: two\n"


@pytest.mark.skipif(sys.platform != "linux", reason="others know no subreapers")
def test_nothing_is_left_of_a_flow_that_is_killed():
    flow = run_flow(f"with Processes() as p: stream(p, {shell(DVC)})\n")
    trainer = pid("trainer")
    flow.kill()
    flow.wait()
    wait_for(lambda: not alive(trainer))


@pytest.mark.skipif(sys.platform != "linux", reason="others know no subreapers")
def test_what_a_killed_command_leaves_ends_with_it_and_the_flow_is_told():
    with Processes() as processes:
        status, _ = stream(processes, shell(f"({DVC}) & while test ! -e trainer; do sleep 0.05; done; kill -9 $$"))
        assert status == 128 + signal.SIGKILL
        assert not alive(pid("trainer"))


def test_a_flow_notices_that_a_supervisor_was_killed_and_ends_the_rest():
    with Processes() as processes:
        status, _ = stream(processes, shell("echo $$ > trainer; kill -9 $PPID; while :; do echo on; sleep 0.01; done"))
        assert status == -signal.SIGKILL
        trainer = pid("trainer")
        wait_for(lambda: not alive(trainer))  # it was killed, and may still be ending


def test_what_does_not_end_when_it_is_asked_to_is_killed(monkeypatch: pytest.MonkeyPatch):
    with Processes() as processes:
        with processes.start(shell("trap '' TERM; echo $$ > pid.part; mv pid.part pid; sleep 60 & wait; wait")):
            stubborn = pid("pid")
            raised = time.monotonic()
            processes.__exit__(None, None, None)
            assert time.monotonic() - raised >= supervisor.GRACE
        assert not alive(stubborn)


def test_a_shell_is_ended_before_its_command_since_it_would_print_how_that_ended(monkeypatch: pytest.MonkeyPatch):
    own, shell, command, detached, child = os.getpid(), 40, 10, 30, 20
    table = {
        child: (detached, 20),
        command: (shell, own),
        detached: (1, own),
        shell: (own, own),
        own: (1, 1),
        50: (1, 1),
    }
    monkeypatch.setattr(supervisor, "_processes", lambda: table)
    monkeypatch.setattr(supervisor, "_reap", lambda: None)
    assert supervisor._family() == [shell, command, detached, child]


def test_leaving_ends_what_other_threads_wait_for_and_nothing_more_is_started():
    caught: list[type[BaseException]] = []

    def train() -> None:
        try:
            stream(processes, shell("echo $$ > pid.part; mv pid.part pid; exec sleep 60"))
        except BaseException as error:
            caught.append(type(error))

    with Processes() as processes:
        thread = threading.Thread(target=train)
        thread.start()
        trainer = pid("pid")
    thread.join()
    assert caught == [Ended]
    assert not alive(trainer)
    with pytest.raises(Ended):
        stream(processes, shell("true"))


def test_a_command_that_takes_too_long_is_ended():
    with Processes() as processes, pytest.raises(TimeoutError):
        stream(processes, shell("echo $$ > pid; exec sleep 60"), timeout=0.5)
    assert not alive(pid("pid"))


@pytest.mark.skipif(sys.platform != "linux", reason="others hide the environment of processes")
def test_what_is_not_started_here_ends_with_a_marked_process_that_is_killed():
    server = ["sh", "-c", "echo $$ > server.part; mv server.part server; exec sleep 60"]
    flow = run_flow(
        f"end_children_with_this_process()\nsubprocess.Popen({server}, start_new_session=True)\ntime.sleep(60)\n"
    )
    started = pid("server")
    flow.kill()
    flow.wait()
    wait_for(lambda: not alive(started))
