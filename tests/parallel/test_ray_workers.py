"""Workers on a real Ray: a cluster of nodes on this machine, and a Ray that a driver starts for itself."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data, Launch
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.sources.source import survey, write_records
from lcmlora.parallel import ray_workers
from tests.data.conftest import add, data_in, load_encoders, picture
from tests.support.latents import LARGE, SETTINGS, tree
from tests.support.repositories import alive
from tests.support.work import Make

ROOT = Path(__file__).parents[2]


def _wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.05)


def _start(*options: str) -> subprocess.Popen[bytes]:
    """Starts a node of one CPU on this machine."""
    command = [Path(sys.executable).with_name("ray"), "start", *options, "--num-cpus", "1", "--block"]
    return subprocess.Popen([*command, "--object-store-memory", "100000000"], stdout=subprocess.DEVNULL)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of two nodes of a CPU each, which ask for a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_workers._own_token())  # Ray reads it once in a process
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # Ray's sockets are below it, and their names must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        head = ("--head", "--port", str(port), "--temp-dir", folder, "--include-dashboard", "false")
        nodes = [_start(*head)]
        try:
            nodes.append(_start("--address", address))
            yield address
        finally:
            for node in reversed(nodes):
                node.terminate()
            for node in nodes:
                node.wait()


@dataclass(frozen=True)
class LoadOnNodes:
    """Loads encoders of a miniature. The first worker that comes to its second batch dies, and nobody begins a second
    shard before workers on three nodes have begun one."""

    folder: Path
    marks: Path

    def __call__(self) -> LoadedBase:
        import ray

        torch.set_num_threads(1)
        base = load_encoders(self.folder, LARGE)
        real, batches = base.encode_pictures, 0

        def encode(pictures: torch.Tensor) -> Any:
            nonlocal batches
            batches += 1
            (self.marks / f"node-{ray.get_runtime_context().get_node_id()}").touch()
            (self.marks / f"batch-{os.getpid()}-{batches}").touch()
            if batches == 2:
                with contextlib.suppress(FileExistsError):  # another one is dead already
                    (self.marks / "killed").touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
            if batches > 3:
                _wait_for(lambda: len(list(self.marks.glob("node-*"))) == 3)
            return real(pictures)

        base.encode_pictures = encode  # type: ignore[method-assign]
        return base


@pytest.mark.slow
def test_a_cluster_with_a_killed_worker_and_a_node_that_joins_makes_the_bytes_of_one_process(
    cluster: str, base_folder: Path, tmp_path: Path
) -> None:
    for number in range(100):
        add(tmp_path / "in", f"{number:03d}.png", f"subject {number % 8}", picture(number, (40, 44)))
    data: Data = data_in(tmp_path / "in")
    write_records(tmp_path / "pictures" / "train.jsonl", survey(data).records)
    base = load_encoders(base_folder, LARGE)
    paths = (tmp_path / "pictures", tmp_path / "scratch")
    torch.set_num_threads(1)
    encode_latents(base, data, SETTINGS, *paths, tmp_path / "alone")

    load = LoadOnNodes(base_folder, tmp_path / "marks")
    load.marks.mkdir()

    def join() -> None:
        _wait_for((load.marks / "killed").exists)
        joined.append(_start("--address", cluster))

    joined: list[subprocess.Popen[bytes]] = []
    joining = threading.Thread(target=join)
    joining.start()
    launch = Launch(engine="ray", address=cluster)
    try:
        encode_latents(base, data, SETTINGS, *paths, tmp_path / "many", launch, load)
    finally:
        joining.join()
        joined[0].terminate()
        joined[0].wait()
    assert tree(tmp_path / "many") == tree(tmp_path / "alone")
    assert len(list((tmp_path / "many").glob("shard-*"))) == 7
    assert len(list(load.marks.glob("node-*"))) == 3
    # 100 pictures in batches of 5, and the two that the killed worker had begun once more.
    assert len(list(load.marks.glob("batch-*"))) == 20 + 2


@pytest.mark.slow
def test_a_ray_of_one_machine_is_reached_from_no_other_and_ends_with_its_driver(tmp_path: Path) -> None:
    make = Make(tmp_path)
    script = f"from tests.support.work import drive; drive({Launch(engine='ray', processes=2).model_dump()!r})"
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    _wait_for(lambda: len(make.lines("begun")) == 2)
    processes = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    assert make.processes() < {process.pid for process in processes}
    listening = [
        each.laddr.ip for process in processes for each in process.net_connections("tcp") if each.status == "LISTEN"
    ]
    assert len(listening) > 3
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    driver.kill()
    driver.wait()
    _wait_for(lambda: not any(map(alive, make.processes())))
    # Ray's agents look every minute whether their raylet is there.
    _wait_for(lambda: not any(alive(process.pid) for process in processes), seconds=180)


def test_places_are_gpus_or_shares_of_the_cpus_of_living_nodes():
    def node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeID": name, "NodeManagerAddress": "10.0.0.1", "Alive": alive, "Resources": resources}

    nodes = [node("head"), node("gpus", CPU=17.0, GPU=2.0), node("cpus", CPU=8.0), node("dead", alive=False, CPU=8.0)]
    on_gpus = [(each.node, each.number, each.cpus, each.gpus) for each in ray_workers.places(nodes, 3, on_gpus=True)]
    assert on_gpus == [("gpus", n, 8.0, 1) for n in range(2)] + [("cpus", n, 2.0, 0) for n in range(3)]
    on_cpus = [(each.node, each.cpus, each.gpus) for each in ray_workers.places(nodes, 1, on_gpus=False)]
    assert on_cpus == [("gpus", 17.0, 0), ("cpus", 8.0, 0)]
    assert [each.cpus for each in ray_workers.places([node("small", CPU=1.0)], 2, on_gpus=False)] == [0.5, 0.5]


def test_a_node_with_other_packages_is_named():
    expected = {"torch": "2.13.0", "lcmlora": "of the source 0123456789ab"}
    assert ray_workers.difference("10.0.0.1", expected | {"lcmlora": None}, expected) == (
        "launch: node 10.0.0.1 of the Ray cluster has no lcmlora; install there what this machine has"
    )
    assert ray_workers.difference("10.0.0.1", expected | {"torch": "2.12.0"}, expected) == (
        "launch: node 10.0.0.1 of the Ray cluster has torch 2.12.0, and this machine 2.13.0: install the same on all "
        "nodes, or they would make other results"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "10.0.0.1:6379"}, "address is for engine ray, and engine is local"),
        ({"engine": "ray", "address": "ray://10.0.0.1:10001"}, "address: expected host:port, got 'ray://10.0.0.1:100"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Launch(**settings)


def test_a_cluster_that_is_not_there_is_told_in_a_line(tmp_path: Path):
    script = "from tests.support.work import drive; drive({'engine': 'ray', 'address': '127.0.0.1:9'})"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "UserError: launch.address: 127.0.0.1:9: " in ended.stderr.splitlines()[-1]


def test_local_workers_import_nothing_of_ray(tmp_path: Path):
    script = (
        "import sys; from lcmlora.config import Launch; from lcmlora.parallel.workers import workers\n"
        "from lcmlora.cli import main; from lcmlora.data.latents import encode\n"
        "from lcmlora.evaluation import evaluate; from tests.support.work import Make; from pathlib import Path\n"
        "with workers(Launch(processes=2), Make(Path(sys.argv[1]))) as pool: list(pool.results(['1']))\n"
        "assert 'ray' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
