"""What Prefect adds to the tasks: the limit between machines, what is tried again, logs and progress."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext

from lcmlora import config
from lcmlora.errors import Unavailable, UserError
from lcmlora.tasks.devices import holding_device
from lcmlora.tasks.dvc import StageFailed, repro, run_stage
from lcmlora.tasks.output import line_listener
from lcmlora.tasks.processes import Command, Processes, stream
from lcmlora.tasks.retrying import networked
from tests.flows.conftest import LIMIT, artifacts
from tests.support import repositories

ROOT = Path(__file__).parents[2]
STAGES = """
stages:
  distill:
    matrix:
      model: [a, b]
    cmd: sh distill.sh ${item.model}
    outs:
      - adapter-${item.model}
"""
# Killed the first time, and every time wrong about b's settings.
DISTILL = """
echo $1 >> tries
test $1 = a || { echo "error: lr: got -1" >&2; exit 2; }
test $(grep -c a tries) = 2 || kill -9 $$
touch adapter-a
"""


@pytest.fixture(autouse=True)
def server(prefect: None) -> Iterator[None]:
    yield


@pytest.fixture
def settings() -> config.Config:
    loaded = config.load(ROOT / "params.yaml")
    quick = loaded.flow.model_copy(update={"gpu_limit": LIMIT, "retries": 2, "retry_seconds": 0.1})
    return loaded.model_copy(update={"flow": quick})


def test_without_the_limit_nothing_runs_and_the_command_that_makes_it_is_told():
    with (
        Processes() as processes,
        pytest.raises(UserError, match=r"no limit 'tpu': `prefect gcl create tpu --limit 1` makes it"),
        holding_device("tpu", processes),
    ):
        raise AssertionError


def test_a_slot_that_another_machine_holds_is_waited_for(capfd: pytest.CaptureFixture):
    taken = threading.Event()
    shown, released = [""], list[float]()

    def elsewhere() -> None:
        with concurrency(LIMIT, strict=True):
            taken.set()
            until = time.monotonic() + 60
            while "waiting" not in shown[0] and time.monotonic() < until:
                time.sleep(0.1)
                shown[0] += capfd.readouterr().err
            released.append(time.monotonic())

    machine = threading.Thread(target=elsewhere)
    machine.start()
    taken.wait()
    with Processes() as processes, holding_device(LIMIT, processes):
        assert time.monotonic() > released[0]
    machine.join()
    assert f"waiting for a slot of Prefect's limit {LIMIT}" in shown[0]


def test_what_was_out_of_reach_is_tried_again_and_nothing_else_is(settings: config.Config):
    calls: list[str] = []

    @task(cache_policy=NO_CACHE)
    def call(error: Exception) -> None:
        calls.append(type(error).__name__)
        raise error

    @flow
    def ask() -> None:
        for error in (Unavailable("the bucket does not answer"), ConnectionError(), UserError("wrong password")):
            with pytest.raises(type(error)):
                networked(call, settings)(error)

    ask()
    assert calls == ["Unavailable"] * 3 + ["ConnectionError"] * 3 + ["UserError"]


def test_a_distillation_that_was_killed_is_resumed_once_and_one_with_wrong_settings_is_not(
    settings: config.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = repositories.make(tmp_path / "repository", STAGES)
    (root / "distill.sh").write_text(DISTILL)
    monkeypatch.chdir(root)

    @flow
    def distill() -> None:
        with Processes() as processes:
            assert run_stage("distill@a", processes, settings).ran
            with pytest.raises(StageFailed, match="distill@b: lr: got -1"):
                run_stage("distill@b", processes, settings)

    distill()
    assert (root / "tries").read_text().split() == ["a", "a", "b"]
    assert repro.retries == 0


def test_lines_are_in_the_log_and_progress_is_an_artifact_that_follows():
    script = "for done in 1 2 3; do echo \"distill a: $done/3  2.0/s  9 s left  loss 0.$done\"; done; echo 'error: no'"

    @task(cache_policy=NO_CACHE)
    def train() -> None:
        with Processes() as processes, line_listener("distill@a-B", "a-B") as listen:
            stream(processes, Command(["sh", "-c", script]), listen=listen)

    @flow
    def run() -> str:
        train()
        return str(FlowRunContext.get().flow_run.id)

    asked = {"logs": {"flow_run_id": {"any_": [run()]}}}
    assert [(each.data, each.description) for each in artifacts("progress-distill-a-b")] == [(100, "distill a: 3 of 3")]
    until = time.monotonic() + 30
    found: list[tuple[int, str]] = []
    while len(found) < 4 and time.monotonic() < until:  # sent every other second
        with get_client(sync_client=True) as client:
            logs = client.request("POST", "/logs/filter", json=asked).json()
        found = [(log["level"], log["message"]) for log in logs if log["message"].startswith(("distill a", "error"))]
    assert sorted(found)[0] == (20, "distill a: 1/3  2.0/s  9 s left  loss 0.1")
    assert (40, "error: no") in found
