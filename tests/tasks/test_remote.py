"""DVC's remote, while it does not answer or refuses: computing goes on, and what was not sent is told."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcmlora import config
from lcmlora.tasks import dvc_command
from lcmlora.tasks.dvc import NotPushed, RemoteUnavailable, StageFailed, push, repro
from lcmlora.tasks.processes import Processes
from lcmlora.tasks.workspace import remote as remotes
from lcmlora.tasks.workspace.remote import Pull, Remote, push_fault
from tests.support.repositories import make

SETTINGS = config.load(Path(__file__).parents[2] / "params.yaml")
STAGES = """
stages:
  first: {cmd: cp source first, deps: [source], outs: [first]}
  second: {cmd: cp first second, deps: [first], outs: [second]}
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make(tmp_path / "repository", STAGES)
    (root / "source").write_text("1\n")
    monkeypatch.chdir(root)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "somebody")
    return root


@pytest.fixture
def silent() -> Iterator[int]:
    """A port of this machine that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    """Returns a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def use(port: int) -> Remote:
    address = "s3://bucket/dvc"
    endpoint = f"http://127.0.0.1:{port}"
    Path(".dvc/config").write_text(
        f"[core]\n    remote = s3\n['remote \"s3\"']\n    url = {address}\n    endpointurl = {endpoint}\n"
    )
    return Remote(address)


def test_stages_run_without_a_remote_that_does_not_answer_and_it_is_asked_and_told_once(
    repository: Path, silent: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(remotes, "_ANSWER", 1.0)
    remote = use(silent)
    with Processes() as processes:
        assert repro.fn("first", processes, SETTINGS, remote=remote).ran
        assert repro.fn("second", processes, SETTINGS, remote=remote).ran
        with pytest.raises(RemoteUnavailable, match=r"^dvc push: does not answer within 1 seconds$"):
            push.fn(processes, SETTINGS)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1 and "s3://bucket/dvc: does not answer" in told[0]


@pytest.mark.slow  # DVC tries for long
def test_a_remote_that_fails_while_a_stage_is_pulled_is_given_up_and_the_stage_runs(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(remotes, "ask", lambda processes: None)  # it answered when the run began
    remote = use(closed_port())
    with Processes() as processes:
        with pytest.raises(StageFailed, match=r"^nowhere: Stage 'nowhere' not found"):
            repro.fn("nowhere", processes, SETTINGS, remote=remote)
        assert remote.fault is None  # that was no fault of the remote
        assert repro.fn("first", processes, SETTINGS, remote=remote).ran
    assert remote.fault is not None and "Could not connect to the endpoint URL" in remote.fault
    assert capfd.readouterr().err.count("this run computes what it would take from there") == 1


def test_a_pull_is_late_until_the_stage_begins_and_not_while_dvcs_lock_is_waited_for():
    remote = Remote("there")
    assert Pull("a", -1.0, remote).is_late
    assert not Pull("a", 5.0, remote).is_late
    waiting = Pull("a", -1.0, remote)
    waiting.listen(f"{dvc_command.WAITS}, which is held by dvc push (process 7)")
    assert not waiting.is_late
    waiting.listen(dvc_command.GOES_ON)
    assert waiting.is_late
    waiting.listen("Running stage 'a':")
    assert waiting.begun and not waiting.is_late
    other = Pull("b", 5.0, remote)
    remote.give_up("is full")
    assert other.is_late  # as another stage has found


def test_a_push_is_whole_only_if_every_file_was_sent_whatever_dvcs_status_says():
    full = "[Errno 28] No space left on device: '/a' -> '/remote/a'"
    lines = [f"ERROR: failed to transfer '/a' - {full}", "ERROR: failed to transfer 'b' - x", "", ""]
    assert push_fault(lines, 0) == f"{full} (and 1 more files)"
    assert push_fault([lines[0], "ERROR: failed to push data to the cloud - 1 files failed to upload"], 1) == full
    assert push_fault(["ERROR: unexpected error - Forbidden: Access Denied", ""], 255) == (
        "unexpected error - Forbidden: Access Denied"
    )
    assert push_fault(["", ""], 0) is None


def test_what_was_not_pushed_is_no_other_failure():
    assert issubclass(RemoteUnavailable, NotPushed)
