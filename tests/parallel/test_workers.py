"""Tasks dealt to workers: real processes of this machine, which do what each task asks of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lcmlora.config import Launch
from lcmlora.errors import NotFound, UserError
from lcmlora.parallel.workers import workers
from tests.support.repositories import alive
from tests.support.work import Make

ROOT = Path(__file__).parents[2]
TWO = Launch(processes=2)


def test_one_process_does_its_tasks_itself_in_order_and_is_told_of_the_next(tmp_path: Path):
    told: list[str] = []

    class Function:
        def expect(self, task: int) -> None:
            told.append(f"expect {task}")

        def __call__(self, task: int) -> int:
            told.append(f"do {task}")
            return os.getpid()

    with workers(Launch(), Function) as pool:
        assert list(pool.results(range(3))) == [(task, os.getpid()) for task in range(3)]
    assert told == ["expect 0", "expect 1", "do 0", "expect 2", "do 1", "do 2"]


def test_two_processes_share_the_tasks_and_each_makes_its_function_once(tmp_path: Path):
    make = Make(tmp_path)
    tasks = [f"slow:{number}" for number in range(8)]
    with workers(TWO, make) as pool:
        assert pool.size == 2
        found = dict(pool.results(tasks))
        assert {task: result for task, (_, result) in found.items()} == {task: task.upper() for task in tasks}
        assert dict(pool.results([])) == {}
        again = dict(pool.results(["x"]))
    used = {process for process, _ in found.values()}
    assert len(used) == 2 and used == make.processes() and {again["x"][0]} < used
    assert sorted(make.lines("done")) == [*tasks, "x"]
    assert not any(map(alive, used))


def test_what_a_dead_worker_had_in_hand_is_done_by_others_and_the_rest_once(tmp_path: Path):
    make = Make(tmp_path)
    tasks = ["slow:1", "die once:2", "slow:3", "die once:4", "slow:5", "slow:6"]
    with workers(TWO, make) as pool:
        assert sorted(task for task, _ in pool.results(tasks)) == sorted(tasks)
        assert pool.size == 2
    assert len(make.processes()) == 4
    assert sorted(make.lines("done")) == sorted(tasks)


def test_a_task_that_kills_three_workers_is_named(tmp_path: Path):
    make = Make(tmp_path)
    with (
        pytest.raises(
            UserError, match=r"^die:2: 3 workers died at it; the last one was ended by SIGKILL, probably for"
        ),
        workers(TWO, make) as pool,
    ):
        list(pool.results(["slow:1", "die:2", "slow:3"]))
    assert make.lines("begun").count("die:2") == 3
    assert not any(map(alive, make.processes()))


def test_an_error_of_a_worker_is_raised_here_and_the_workers_go_on_with_other_tasks(tmp_path: Path):
    with workers(TWO, Make(tmp_path)) as pool:
        with pytest.raises(NotFound, match=r"^user error:1: not found$") as raised:
            list(pool.results(["user error:1", "slow:2", "slow:3", "error:4"]))
        assert raised.value.__cause__ is None
        with pytest.raises(ZeroDivisionError, match=r"^error:5$") as other:
            list(pool.results(["error:5"]))
        assert "raise ZeroDivisionError(task)" in str(other.value.__cause__)
        with pytest.raises(Exception, match="pickle"):
            list(pool.results(["function"]))
        # What the failed calls have left is no result of this one.
        assert [task for task, _ in pool.results(["6"])] == ["6"]


def test_a_worker_that_cannot_begin_says_why(tmp_path: Path):
    with pytest.raises(NotFound, match=r"^base: not found$"), workers(TWO, Make(tmp_path, fails=True)) as pool:
        list(pool.results(["1"]))
    with (
        pytest.raises(UserError, match="3 workers died before they could do anything; the last one ended with status"),
        workers(TWO, sys.exit) as pool,
    ):
        list(pool.results(["1"]))


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_ended_leaves_no_worker(tmp_path: Path, number: signal.Signals):
    make = Make(tmp_path)
    driver = subprocess.Popen(
        [sys.executable, "-c", "from tests.support.work import drive; drive()", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    _wait_for(lambda: len(make.lines("begun")) == 2)
    driver.send_signal(number)
    assert driver.wait(120) == -number
    _wait_for(lambda: not any(map(alive, make.processes())))
