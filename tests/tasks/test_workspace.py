"""Looking at a folder in which a stage runs, waiting for it, and saying why stages are stale."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcmlora import config
from lcmlora.tasks import dvc
from lcmlora.tasks.dvc import look, repro, stale
from lcmlora.tasks.dvc_internals import LOCK
from lcmlora.tasks.processes import Processes, kill_group
from lcmlora.tasks.workspace import activity
from lcmlora.tasks.workspace.state import Running, reasons
from tests.support.repositories import make
from tests.tasks.test_processes import wait_for

SETTINGS = config.load(Path(__file__).parents[2] / "params.yaml")

STAGES = """
stages:
  first:
    cmd: cp source first
    deps: [source]
    params: [{resolved.yaml: [first]}]
    outs: [first]
  slow:
    cmd: touch begun; while test ! -e go; do sleep 0.05; done; cp first slow
    deps: [first]
    outs: [slow]
  after:
    cmd: cp slow after
    deps: [slow]
    outs: [after]
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make(tmp_path / "repository", STAGES)
    (root / "source").write_text("1\n")
    (root / "resolved.yaml").write_text("first: {algorithms: {first: 3}, distill: {steps: 700}}\n")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def by_hand(repository: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A person's `dvc repro slow`, whose stage runs until there is a file `go`."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", activity.RUN: "amber-otter"}
    command = [sys.executable, "-m", "dvc", "repro", "-q", "slow"]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    wait_for(Path("begun").exists)
    yield process
    kill_group(process)
    process.wait()


def test_beside_a_running_stage_a_look_says_what_runs_and_why_others_are_stale_and_who_needs_it_waits(
    repository: Path, by_hand: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]
):
    (repository / "resolved.yaml").write_text("first: {algorithms: {first: 4}, distill: {steps: 900}}\n")
    before = Path("dvc.lock").read_bytes()
    with Processes() as processes:
        found = look(["first", "slow", "after", "missing"], processes)
        assert found.reasons == {
            "first": ["version of stage first 3 -> 4", "distill.steps 700 -> 900"],
            "missing": ["is not in dvc.yaml yet"],
        }
        assert found.blocked == {"slow": [by_hand.pid], "after": [by_hand.pid]}
        (running,) = found.running
        assert (running.stage, running.process, running.run) == ("slow", by_hand.pid, "amber-otter")
        assert running.since is not None and running.command == "dvc repro -q slow"
        settings = look(["first"], processes, SETTINGS)  # whose resolved.yaml has no entry `first`
        assert settings.reasons["first"][0].endswith("'distill': {'steps': 700}} -> not set")
        assert "900" in Path("resolved.yaml").read_text()  # it is not written
        assert stale.fn(["slow", "after"], processes) == {"slow", "after"}  # only its end tells
        assert Path("dvc.lock").read_bytes() == before and by_hand.poll() is None

        results: list[dvc.StageResult] = []
        thread = threading.Thread(target=lambda: results.append(repro.fn("after", processes, SETTINGS)))
        thread.start()
        said = ""

        def is_told() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return "after waits for dvc repro -q slow" in said

        wait_for(is_told)
        assert f"(process {by_hand.pid} of run amber-otter, since " in said and not results
        Path("go").touch()
        thread.join()
        assert by_hand.wait() == 0
    assert [result.ran for result in results] == [True]
    assert Path("after").read_text() == "1\n" and "busy" not in said


def test_who_waits_for_dvcs_lock_says_for_whom(repository: Path, capfd: pytest.CaptureFixture[str]):
    LOCK.touch()
    hold = "import fcntl, os, sys; f = open(sys.argv[2], 'r+'); fcntl.flock(f, 2); f.write(f' {os.getpid()}\\n')"
    hold += "; f.flush(); open('begun', 'w'); sys.stdin.read()"
    pushing = subprocess.Popen([sys.executable, "-c", hold, "dvc", str(LOCK)], stdin=subprocess.PIPE)
    wait_for(Path("begun").exists)
    said = ""
    with Processes() as processes:
        assert look(["first"], processes).reasons == {"first": ["has not run yet"]}  # it waits for no lock
        thread = threading.Thread(target=repro.fn, args=("first", processes, SETTINGS))
        thread.start()

        def is_told() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return "waiting for DVC's lock, which is held by dvc .dvc/tmp/lock" in said

        wait_for(is_told)
        pushing.communicate()
        thread.join()
    assert f"(process {pushing.pid}, since " in said
    assert "DVC's lock is free" in said + capfd.readouterr().err and Path("first").exists()


def parameter(file: str, key: str, old: object, new: object) -> dict[str, object]:
    return {"what": "parameter", "file": file, "key": key, "old": old, "new": new}


BASE = parameter("resolved.yaml", "models.a.encode", {"base": {"variant": None}}, {"base": {"variant": "fp16"}})
SPLIT = parameter("resolved.yaml", "prepare", {"data": {"split": ["train"]}}, {"data": {}})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"what": "input", "path": "data/pictures", "how": "modified"}, "data/pictures has changed"),
        ({"what": "input", "path": "adapters/emoji", "how": "deleted"}, "adapters/emoji is missing"),
        ({"what": "output", "path": "release/a", "how": "modified"}, "release/a was changed after the stage ran"),
        ({"what": "output", "path": "reference/a", "how": "not in cache"}, "reference/a is not in DVC's cache"),
        ({"what": "command"}, "its command in dvc.yaml has changed"),
        (BASE, "base.variant null -> fp16"),
        (SPLIT, "data.split ['train'] -> not set"),
        (parameter("other.yaml", "lr", 1, 2), "other.yaml: lr 1 -> 2"),
    ],
)
def test_a_change_is_told_in_words(change: dict[str, object], line: str):
    assert reasons([change]) == [line]


def test_of_many_changes_the_first_are_told_and_the_others_counted():
    old, new = ({str(n): value for n in range(20)} for value in (1, 2))
    lines = reasons([parameter("resolved.yaml", "k", old, new)])
    assert lines[0] == "0 1 -> 2" and lines[-1] == "14 more changes" and len(lines) == 7


def test_what_runs_is_told_with_its_run_or_its_command():
    assert (
        Running("a", "2026-11-29T10:00:00Z", 7, "dvc repro a").line
        == "a since 2026-11-29T10:00:00Z (process 7, dvc repro a)"
    )
    assert Running("a", None, None, None, "amber-otter").line == "a (run amber-otter)"
