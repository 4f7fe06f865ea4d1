import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lcmlora.tasks.devices import holding_device
from lcmlora.tasks.processes import Ended, Processes, stream
from tests.support.repositories import alive
from tests.tasks.test_processes import ROOT, pid, shell, wait_for

FLOW = """
from lcmlora.tasks.devices import *
from lcmlora.tasks.processes import *
with Processes() as p, holding_device("gpu", p):
    stream(p, Command(["sh", "-c", "trap '' TERM; echo $$ > trainer.part; mv trainer.part trainer; sleep 60; :"]))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_next_waits_until_the_last_process_of_a_killed_flow_is_gone(tmp_path: Path, capfd):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen([sys.executable, "-c", FLOW], env=environment)
    trainer = pid("trainer")
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    assert alive(trainer)  # it does not listen to SIGTERM, and has its grace
    with Processes() as processes, holding_device("gpu", processes):
        assert not alive(trainer)
    assert f"waiting for gpu, held by process {flow.pid}" in capfd.readouterr().err


def test_one_thread_at_a_time_has_a_device_and_another_device_is_free():
    within: list[int] = []

    def train() -> None:
        with holding_device("gpu", processes):
            within.append(1)
            stream(processes, shell("sleep 0.1"))
            assert within == [1]
            within.remove(1)

    with Processes() as processes:
        threads = [threading.Thread(target=train) for _ in range(3)]
        for thread in threads:
            thread.start()
        with holding_device("gpu1", processes):
            for thread in threads:
                thread.join()
    assert within == []


def test_a_lock_is_given_back_with_the_block_whatever_else_was_started_meanwhile():
    with Processes() as processes:
        other = threading.Thread(target=lambda: stream(processes, shell("echo $$ > other; exec sleep 0.5")))
        with holding_device("gpu", processes):
            other.start()
            wait_for(Path("other").exists)
        with holding_device("gpu", processes):
            assert alive(pid("other"))
        other.join()


def test_who_waits_for_a_device_is_interrupted_when_the_flow_ends():
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            with holding_device("gpu", second):
                pass
        except Ended as error:
            caught.append(error)

    with Processes() as first, holding_device("gpu", first):
        with Processes() as second:
            thread = threading.Thread(target=wait)
            thread.start()
            time.sleep(0.3)
        thread.join()
    assert len(caught) == 1
