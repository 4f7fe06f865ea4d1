import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dvc
import pytest

from lcmlora import config
from lcmlora.tasks import dvc_command
from lcmlora.tasks.dvc import NotPushed, StageFailed, default_remote, differing, is_shared, push, repro, resolve, stale
from lcmlora.tasks.processes import Processes
from lcmlora.tasks.workspace.remote import Remote
from tests.support.repositories import alive, make

SETTINGS = config.load(Path(__file__).parents[2] / "params.yaml")

STAGES = """
stages:
  first:
    cmd: echo making first; cp source first
    deps: [source]
    outs: [first]
  second:
    matrix:
      model: [a, b]
    cmd: cp first second-${item.model}
    deps: [first]
    outs:
      - second-${item.model}
  broken:
    cmd: sh broken.sh
    outs: [never]
  slow:
    cmd: sh slow.sh
    outs: [never-either]
  tell:
    cmd: sh tell.sh
    outs: [told]
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make(tmp_path / "repository", STAGES)
    (root / "source").write_text("1\n")
    (root / "broken.sh").write_text("echo working; echo 'error: the disk is full' >&2; echo bye; exit 2\n")
    # Like a trainer that DVC started and that DVC's end does not end.
    (root / "slow.sh").write_text("trap '' TERM; echo $$ > pid.part; mv pid.part pid; sleep 60 & wait; wait\n")
    (root / "tell.sh").write_text("test -t 2 && echo terminal > told || echo none > told\n")
    monkeypatch.chdir(root)
    return root


def test_a_stage_runs_once_and_what_follows_a_change_is_stale(repository: Path, capfd: pytest.CaptureFixture):
    with Processes() as processes:
        assert stale.fn(["first", "second@a"], processes) == {"first", "second@a"}
        assert repro.fn("first", processes, SETTINGS).ran is True
        shown = capfd.readouterr()
        assert "making first" in shown.err
        assert shown.out == ""
        assert repro.fn("first", processes, SETTINGS).ran is False
        assert repro.fn("second@a", processes, SETTINGS).ran is True
        assert not (repository / "second-b").exists()
        assert stale.fn(["first", "second@a"], processes) == set()
        (repository / "source").write_text("2\n")
        assert stale.fn(["first", "second@a"], processes) == {"first"}


def test_force_runs_a_stage_that_is_up_to_date_and_a_lost_output_comes_from_the_cache(repository: Path):
    with Processes() as processes:
        repro.fn("first", processes, SETTINGS)
        assert repro.fn("first", processes, SETTINGS, force=True).ran is True
        (repository / "first").unlink()
        assert repro.fn("first", processes, SETTINGS).ran is False
    assert (repository / "first").read_text() == "1\n"


def test_a_failing_stage_is_told_by_its_own_error_line(repository: Path):
    with Processes() as processes, pytest.raises(StageFailed) as caught:
        repro.fn("broken", processes, SETTINGS)
    assert str(caught.value) == "broken: the disk is full"
    assert not caught.value.resumable


def test_a_stage_that_is_killed_says_that_it_can_be_resumed(repository: Path):
    (repository / "broken.sh").write_text("kill -9 $$\n")
    with Processes() as processes, pytest.raises(StageFailed, match=r"broken: .*(-9|137)") as caught:
        repro.fn("broken", processes, SETTINGS)
    assert caught.value.resumable


def test_a_stage_that_takes_too_long_is_ended(repository: Path):
    hasty = SETTINGS.model_copy(update={"flow": SETTINGS.flow.model_copy(update={"timeout_hours": 4 / 3600})})
    (repository / "slow.sh").write_text("echo $$ > pid; sleep 60\n")
    with Processes() as processes, pytest.raises(StageFailed, match=r"slow: was ended, .*\(flow.timeout_hours\)"):
        repro.fn("slow", processes, hasty)
    assert not alive(int((repository / "pid").read_text()))


def test_what_dvc_reads_is_brought_up_to_date_before_it_is_asked(repository: Path, monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))
    params = (root / "params.yaml").read_text()
    Path("params.yaml").write_text(params)
    with Processes() as processes:
        resolve.fn(processes)
        assert not Path("resolved.yaml").exists()  # this dvc.yaml does not ask for it
        outs = "outs: [{resolved.yaml: {cache: false, persist: true}}]"
        tried = "params: [{resolved.yaml: [prepare]}], cmd: cp source tried, outs: [tried]"
        stages = f"  resolve: {{cmd: {sys.executable} -m lcmlora resolve, always_changed: true, {outs}}}\n"
        Path("dvc.yaml").write_text(f"{STAGES}{stages}  tried: {{{tried}}}\n")
        resolve.fn(processes)
        repro.fn("tried", processes, SETTINGS)
        before = Path("dvc.lock").stat().st_mtime_ns
        resolve.fn(processes)
        assert Path("dvc.lock").stat().st_mtime_ns == before
        assert stale.fn(["tried"], processes) == set()
        Path("params.yaml").write_text(params.replace("data:\n", "data:\n  min_side: 32\n", 1))
        resolve.fn(processes)
        assert stale.fn(["tried"], processes) == {"tried"}


def test_a_stage_that_does_not_exist_and_a_dvc_yaml_that_is_none_are_told_in_one_line(repository: Path):
    with Processes() as processes:
        with pytest.raises(StageFailed, match=r"^nowhere: Stage 'nowhere' not found inside 'dvc.yaml' file$"):
            repro.fn("nowhere", processes, SETTINGS)
        (repository / "dvc.yaml").write_text("stages: 3\n")
        with pytest.raises(StageFailed, match=r"^dvc status: ") as caught:
            stale.fn(["first"], processes)
    assert "\n" not in str(caught.value)


def test_a_default_remote_is_seen_and_restores_what_the_cache_lost(repository: Path, tmp_path: Path):
    def dvc(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)

    with Processes() as processes:
        assert default_remote() is None
        dvc("remote", "add", "--default", "shipped", str(tmp_path / "remote"))
        assert default_remote() == str(tmp_path / "remote")
        repro.fn("first", processes, SETTINGS)
        push.fn(processes, SETTINGS)
        assert any((tmp_path / "remote" / "runs").iterdir())  # the run-cache, which a plain push leaves out
        subprocess.run(["rm", "-r", ".dvc/cache", "first"], check=True)
        assert repro.fn("first", processes, SETTINGS, remote=Remote("shipped")).ran is False
    assert (repository / "first").read_text() == "1\n"


def test_what_lies_inside_the_repository_is_not_shared_and_all_else_is(repository: Path, tmp_path: Path):
    assert not is_shared(None)
    assert not is_shared(str(repository / "shipped"))
    assert is_shared(str(tmp_path / "elsewhere")) and is_shared("s3://bucket/dvc")


def test_a_remote_that_cannot_be_reached_is_named(repository: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    remote = [sys.executable, "-m", "dvc", "remote", "add", "--default", "broken", str(tmp_path / "file" / "remote")]
    subprocess.run(remote, check=True, capture_output=True)
    with Processes() as processes:
        repro.fn("first", processes, SETTINGS)
        with pytest.raises(NotPushed, match="dvc push: "):
            push.fn(processes, SETTINGS)


def test_an_interrupt_ends_the_whole_process_group(repository: Path):
    pid_file = repository / "pid"

    def interrupt() -> None:
        until = time.monotonic() + 60
        while not pid_file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    # A runner started in the background has SIGINT ignored, and Python then leaves it so.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt), Processes() as processes:
            repro.fn("slow", processes, SETTINGS)
    finally:
        signal.signal(signal.SIGINT, former)
    assert not alive(int(pid_file.read_text()))


def test_a_stage_sees_a_terminal_where_there_is_one(repository: Path):
    script = "from tests.tasks.test_dvc import *\nwith Processes() as p: repro.fn('tell', p, SETTINGS)\n"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, stderr=theirs)
    os.close(ours)
    os.close(theirs)
    assert (repository / "told").read_text() == "terminal\n"
    (repository / "told").unlink()
    with Processes() as processes:
        repro.fn("tell", processes, SETTINGS, force=True)
    assert (repository / "told").read_text() == "none\n"


def test_a_run_that_gave_what_git_has_is_told_from_one_that_did_not(repository: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    with Processes() as processes:
        repro.fn("first", processes, SETTINGS)
        assert differing(["first"]) is None  # nothing is committed
        git("add", ".")
        git("commit", "-qm", "first")
        repro.fn("first", processes, SETTINGS, force=True)
        assert differing(["first"]) == []
        (repository / "source").write_text("2\n")
        repro.fn("first", processes, SETTINGS)
        assert differing(["first", "second@a"]) == ["first"]
    monkeypatch.setenv("PATH", str(repository))
    assert differing(["first"]) is None  # there is no Git


def test_of_what_dvc_says_a_person_sees_what_runs_and_no_advice(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    def command(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)

    command("remote", "add", "--default", "shipped", str(tmp_path / "remote"))
    with Processes() as processes:
        repro.fn("first", processes, SETTINGS)
        push.fn(processes, SETTINGS)
        subprocess.run(["rm", "-r", ".dvc/cache", "first"], check=True)
        capfd.readouterr()
        repro.fn("first", processes, SETTINGS, remote=Remote("shipped"))
        assert capfd.readouterr().err.splitlines() == ["Stage 'first' is restored from the remote"]
        subprocess.run(["rm", "-r", ".dvc/cache", str(tmp_path / "remote"), "first"], check=True)
        repro.fn("first", processes, SETTINGS, remote=Remote("shipped"))
        assert capfd.readouterr().err.splitlines() == ["Running stage 'first':", "making first"]


def test_what_dvc_says_in_this_version_is_what_is_looked_for():
    """Else its advice is seen again, and that a stage ran is not."""
    texts = "".join(path.read_text() for path in Path(dvc.__file__).parent.rglob("*.py"))
    texts = re.sub(r'"\s*"', "", texts)
    for message in (*dvc_command.ADVICE, *dvc_command.SHOWN, dvc_command.PULLING, *dvc_command.NOT_PULLED):
        assert f'"{message}' in texts


@pytest.mark.parametrize(
    ("level", "message", "told"),
    [
        (logging.INFO, "> lcmlora encode", False),
        (logging.WARNING, "Some of the cache files do not exist neither locally nor on remote. Missing:\n%s", False),
        (logging.WARNING, "corrupted cache file '%s'.", True),
        (logging.ERROR, "failed to reproduce", True),
    ],
)
def test_warnings_and_errors_come_through(level: int, message: str, told: bool):
    record = logging.LogRecord("dvc", level, "", 0, message, ("x",), None)
    assert dvc_command.MessageFilter()(record) is told
