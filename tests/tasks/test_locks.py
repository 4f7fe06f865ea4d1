"""Locks that outlast a cleaner of temporary files, and that users share who do not trust each other."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcmlora.errors import UserError
from lcmlora.io import private
from lcmlora.tasks.devices import holding_device
from lcmlora.tasks.machine.gpus import Gpu, visible
from lcmlora.tasks.machine.locks import Unusable, holding_lock
from lcmlora.tasks.processes import Processes
from tests.tasks.test_processes import wait_for

ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
NOBODY = 65534

# Another user's program: it locks a file and says so.
LOCKER = """
import fcntl, os, sys
os.setgid(65534); os.setuid(65534)
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
ONE_GPU = "#!/bin/sh\necho 'GPU-aaaa, NVIDIA H200'\n"


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as /run/lock is: everybody may make files in it."""
    for folder in (*tmp_path.parents, tmp_path):
        if folder.stat().st_uid == os.getuid() and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o011)  # so that another user comes in
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv(private.LOCKS, str(folder))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return folder


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with one GPU: the UUID that its nvidia-smi lists."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(ONE_GPU)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return "GPU-aaaa"


@pytest.fixture
def elsewhere(shared: Path) -> Iterator[subprocess.Popen[str]]:
    """Another user's process that holds the lock of the GPU."""
    path = shared / "lcmlora-GPU-aaaa.lock"
    path.touch()
    path.chmod(0o666)
    os.chown(path, NOBODY, NOBODY)
    command = [sys.executable, "-IS", "-c", LOCKER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_one_at_a_time_holds_a_lock_whose_file_a_cleaner_deletes(tmp_path: Path):
    path, inside, most = tmp_path / "gpu.lock", [], []
    release = {name: threading.Event() for name in "abc"}

    def hold(name: str) -> None:
        with Processes() as processes, holding_lock(path, "gpu", processes, exposed=True):
            inside.append(name)
            most.append(len(inside))
            release[name].wait(30)
            inside.remove(name)

    threads = {name: threading.Thread(target=hold, args=(name,)) for name in "abc"}
    threads["a"].start()
    wait_for(lambda: inside == ["a"])
    threads["b"].start()  # waits, with the file open that is deleted now
    time.sleep(0.5)
    path.unlink()
    wait_for(path.exists)  # the holder makes it again
    threads["c"].start()  # opens the new file
    path.unlink()
    wait_for(path.exists)
    assert inside == ["a"]
    for name in "abc":
        release[name].set()
    for thread in threads.values():
        thread.join()
    assert most == [1, 1, 1]


@ROOT_ONLY
def test_a_gpu_that_another_user_trains_on_is_waited_for_and_the_user_is_named(
    gpu: str, elsewhere: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
):
    held = threading.Event()

    def train() -> None:
        with Processes() as processes, holding_device("gpu", processes):
            held.set()

    thread = threading.Thread(target=train)
    thread.start()
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "waiting for GPU GPU-aaaa" in said

    wait_for(is_told)
    assert f"held by process {elsewhere.pid} of user nobody, which runs since 20" in said and not held.is_set()
    elsewhere.communicate()
    thread.join()
    assert held.is_set()


@pytest.mark.parametrize("made", ["link", "folder", "pipe", "second name", "closed"])
def test_what_another_user_puts_in_a_locks_place_stops_nobody_and_nothing_is_written_there(
    gpu: str, shared: Path, tmp_path: Path, made: str, capfd: pytest.CaptureFixture[str]
):
    path, victim = shared / "lcmlora-GPU-aaaa.lock", shared / "victim"
    victim.write_text("precious")
    if made == "closed":
        if os.getuid() == 0:
            pytest.skip("everything is open to root")
        path.touch(0o000)
    {"link": path.symlink_to, "second name": path.hardlink_to}.get(made, lambda _: None)(victim)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(made, lambda: None)()
    with Processes() as processes:
        lock = holding_lock(path, "gpu", processes, shared=True)
        with pytest.raises(Unusable, match=r"cannot be locked: .*, and belongs to "), lock:
            pass
        with holding_device("gpu", processes):
            assert (tmp_path / "lcmlora" / path.name).is_file()  # of this user alone
    assert "other users of GPU GPU-aaaa are not waited for until that is removed" in capfd.readouterr().err
    assert victim.read_text() == "precious"


@ROOT_ONLY
def test_a_file_of_another_user_is_locked_and_never_written(gpu: str, shared: Path):
    path = shared / "lcmlora-GPU-aaaa.lock"
    path.write_text("theirs")
    os.chown(path, NOBODY, NOBODY)
    with Processes() as processes, holding_device("gpu", processes):
        assert path.read_text() == "theirs"


def test_two_limits_on_one_gpu_are_one_lock_and_two_gpus_are_two(
    gpu: str, shared: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    trained: list[str] = []

    def train() -> None:
        with holding_device("other", processes):
            trained.append("other")

    with Processes() as processes:
        thread = threading.Thread(target=train)
        with holding_device("gpu", processes):
            assert [path.name for path in shared.iterdir()] == ["lcmlora-GPU-aaaa.lock"]
            assert (shared / "lcmlora-GPU-aaaa.lock").stat().st_mode & 0o777 == 0o666
            thread.start()
            wait_for(lambda: "waiting for GPU GPU-aaaa" in capfd.readouterr().err)
            # A GPU of its own (a part of one, here): nobody is waited for.
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-bbbb")
            with holding_device("other", processes):
                assert trained == []
        thread.join()
    assert trained == ["other"]


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [
        ({}, 1, ["GPU-a"]),
        ({}, 8, ["GPU-a", "GPU-b", "GPU-bc"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1, ["GPU-b"]),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, 2, ["GPU-bc", "GPU-a"]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, 8, ["GPU-a"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bc"}, 1, ["GPU-bc"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, 1, []),  # of several
        ({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, 1, ["MIG-1234"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 1, []),
    ],
)
def test_the_gpus_that_cuda_shows_are_found_by_number_and_by_name(environment: dict, count: int, expected: list[str]):
    gpus = [Gpu(uuid, "H200") for uuid in ("GPU-a", "GPU-b", "GPU-bc")]
    assert visible(gpus, environment, count) == expected


def test_where_cuda_may_number_otherwise_all_gpus_count():
    gpus = [Gpu("GPU-a", "T4"), Gpu("GPU-b", "H200")]
    assert visible(gpus, {"CUDA_VISIBLE_DEVICES": "0"}, 1) == ["GPU-a", "GPU-b"]
    by_bus = {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible(gpus, by_bus, 1) == ["GPU-a"]
    assert visible(gpus, {"CUDA_VISIBLE_DEVICES": "GPU-b"}, 1) == ["GPU-b"]


def test_a_folder_of_locks_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(private.LOCKS, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"LCMLORA_LOCKS: .*/nowhere: expected a folder"):
        private.shared_folder()
