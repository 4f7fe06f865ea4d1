"""Training in many processes: real ones."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcmlora.adapters import lora
from lcmlora.config import Launch
from lcmlora.data.latents.cache import LatentCache
from lcmlora.errors import UserError
from lcmlora.io.files import locked
from lcmlora.io.parsing import Malformed
from lcmlora.parallel import ranks
from lcmlora.parallel.exchange import ProcessEnded, SocketPairs
from lcmlora.parallel.ranks import Ranks

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def _started(
    settings: str, base: Path, cache: LatentCache, work: Path, kill_at: int, victim: str, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a launcher of trainers, which is killed with the block."""
    script = "import sys; from lcmlora.parallel.launcher import launch; from lcmlora.config import Launch; "
    script += f"sys.exit(launch(Launch({settings}), 'tests.support.trainer', sys.argv[1:]))"
    arguments = [str(base), str(cache._folder), str(work), str(kill_at), victim]
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    with subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, env=given) as launched:
        try:
            yield launched
        finally:
            launched.kill()


def _train(processes: int, base: Path, cache: LatentCache, work: Path, kill_at: int = -1, victim: str = "self") -> int:
    """Returns the exit status of `processes` trainers."""
    with _started(f"processes={processes}", base, cache, work, kill_at, victim) as launched:
        return launched.wait()


@pytest.fixture(scope="module")
def adapters(base_folder: Path, cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `1` and `2` of undisturbed runs in as many processes, of the same number of pictures in a step."""
    root = tmp_path_factory.mktemp("adapters")
    for processes in (1, 2):
        assert _train(processes, base_folder, cache, root / str(processes)) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_they_end_with_the_same_bytes(
    adapters: Path, base_folder: Path, cache: LatentCache, tmp_path: Path, processes: int
):
    assert _train(processes, base_folder, cache, tmp_path, kill_at=4) != 0
    state = torch.load(tmp_path / "scratch/checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and not (tmp_path / "adapter").exists()
    assert _train(processes, base_folder, cache, tmp_path) == 0
    for name in (lora.WEIGHTS, "config.json", "probe.safetensors"):
        whole = adapters / str(processes) / "adapter" / name
        assert (tmp_path / "adapter" / name).read_bytes() == whole.read_bytes()


def test_a_launcher_that_is_killed_takes_its_processes_with_it(base_folder: Path, cache: LatentCache, tmp_path: Path):
    assert _train(2, base_folder, cache, tmp_path, kill_at=4, victim="launcher") == -signal.SIGKILL
    until = time.monotonic() + 60
    for rank in ("0", "1"):
        while time.monotonic() < until:
            with contextlib.suppress(UserError), locked(tmp_path / "scratch" / rank):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"process {rank} still works")
    assert not (tmp_path / "adapter").exists()


def test_two_processes_make_the_adapter_that_one_makes_of_as_many_pictures(adapters: Path):
    one, two = (load_file(adapters / str(n) / "adapter" / lora.WEIGHTS) for n in (1, 2))
    fresh = {name: value for name, value in one.items() if ".lora_B." in name}
    assert all(value.abs().max() > 1e-4 for value in fresh.values())  # B starts at zero
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_torchrun_from_outside_makes_the_same_bytes(
    adapters: Path, base_folder: Path, cache: LatentCache, tmp_path: Path
):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = ["tests.support.trainer", str(base_folder), str(cache._folder), str(tmp_path), "-1", "self"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert subprocess.run([*command, *arguments], cwd=ROOT, env=environment).returncode == 0
    for name in (lora.WEIGHTS, "config.json", "probe.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (adapters / "2" / "adapter" / name).read_bytes()


@pytest.mark.slow
def test_two_machines_make_the_bytes_of_two_processes(
    adapters: Path, base_folder: Path, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("LCMLORA_RUN_ID", "0123456789abcdef")
    settings = f"processes=1, machines=2, rendezvous={place!r}"
    with (
        _started(settings, base_folder, cache, tmp_path, -1, "self") as one,
        _started(settings, base_folder, cache, tmp_path, -1, "self") as two,
    ):
        assert one.wait() == 0 and two.wait() == 0
    for name in (lora.WEIGHTS, "config.json", "probe.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (adapters / "2" / "adapter" / name).read_bytes()


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(adapters: Path, base_folder: Path, cache: LatentCache, tmp_path: Path):
    assert _train(1, base_folder, cache, tmp_path, kill_at=4) != 0
    assert _train(2, base_folder, cache, tmp_path) == 0
    one, both = (load_file(folder / "adapter" / lora.WEIGHTS) for folder in (adapters / "1", tmp_path))
    for name in one:
        torch.testing.assert_close(both[name], one[name], atol=1e-5, rtol=0)


def test_alone_there_is_nothing_to_exchange():
    place, tensor = Ranks(), torch.ones(2)
    place.all_reduce_sum(tensor)
    place.agree(anything=1)
    place.wait()
    assert tensor.tolist() == [1, 1] and place.first and not ranks.launched()


def _together(*calls: Callable[[Ranks], object]) -> list[object]:
    """Returns what each call returned or raised, of ranks that have connected sockets."""
    ends = [socket.socketpair() for _ in calls[1:]]
    groups = [[here for here, _ in ends], *([there] for _, there in ends)]
    size = len(calls)
    places = [Ranks(rank, size, SocketPairs(sockets, rank, size)) for rank, sockets in enumerate(groups)]

    def run(call: Callable[[Ranks], object], place: Ranks) -> object:
        try:
            return call(place)
        except Exception as error:
            return error
        finally:
            assert place.exchange is not None
            place.exchange.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, calls, places))


def test_processes_with_different_files_are_told_which():
    for error in _together(lambda one: one.agree(latent_cache="aaaa"), lambda two: two.agree(latent_cache="bbbb")):
        assert isinstance(error, UserError)
        assert "process 1 has 'bbbb' as latent cache, process 0 has 'aaaa'" in str(error)


def test_of_different_settings_the_one_that_differs_is_told():
    other = Launch(processes=3)
    _, error = _together(lambda one: one.agree(settings=Launch()), lambda two: two.agree(settings=other))
    assert "process 1 has 3 as settings.processes, process 0 has 1" in str(error)
    assert _together(*[lambda place: place.agree(settings=other, base=("a", 1))] * 3) == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sum_is_that_of_all_in_the_order_of_the_ranks(dtype: torch.dtype):
    parts = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    held = [part.T.contiguous().T if rank == 1 else part.clone() for rank, part in enumerate(parts)]
    _together(*(lambda place, mine=mine: place.all_reduce_sum(mine) for mine in held))
    assert all(torch.equal(mine, parts[0] + parts[1] + parts[2]) for mine in held)


def test_who_misses_another_process_is_told_so():
    def leave(place: Ranks) -> None:
        raise RuntimeError("gone")

    assert isinstance(_together(lambda one: one.wait(), leave)[0], ProcessEnded)


def test_who_has_all_of_a_last_exchange_may_go_before_the_others_have():
    for _ in range(50):
        assert _together(*[lambda place: place.wait()] * 3) == [None] * 3


def test_nothing_that_is_sent_is_unpickled(tmp_path: Path):
    harm = tmp_path / "harm"

    def send(place: Ranks) -> None:
        assert place.exchange is not None
        place.exchange.gather(b"cos\nsystem\n(S'touch " + str(harm).encode() + b"'\ntR.")

    error, _ = _together(lambda one: one.agree(latent_cache="aaaa"), send)
    assert isinstance(error, Malformed) and not harm.exists()


def test_many_machines_need_a_place_to_meet():
    with pytest.raises(ValueError, match=r"rendezvous \(host:port\) is needed for 2 machines"):
        Launch(machines=2)


STRANGER = """
import os, socket, sys
folder, *places = sys.argv[1:]
for place in places:
    host, port = place.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 2)
        print("connected to", place)
    except OSError:
        pass
for path in (folder, *(f"/proc/{pid}/{part}" for pid in os.environ["PIDS"].split() for part in ("fd", "environ"))):
    try:
        print(path, os.listdir(path) if not path.endswith("environ") else open(path).read())
    except PermissionError:
        pass
"""


def _listening(pids: set[int]) -> list[str]:
    """Returns where these processes listen: TCP's addresses, and the names of Unix sockets."""
    inodes = set()
    for pid in pids:
        for link in Path("/proc", str(pid), "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] == "0A":
                host, port = fields[1].split(":")
                found.append(f"{'127.0.0.1' if table == 'tcp' else '::1'}:{int(port, 16)} ({host})")
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] in inodes and int(fields[3], 16) & 0x10000:
            found.append(" ".join(fields[7:]) or "unnamed")
    return found


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs a second user")
def test_a_second_user_finds_nothing_to_connect_to_in_a_distillation(
    base_folder: Path, cache: LatentCache, tmp_path: Path
):
    with _started("processes=2", base_folder, cache, tmp_path, 4, "pause") as launched:
        until = time.monotonic() + 60
        while not (tmp_path / "paused").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert (tmp_path / "paused").exists()
        pids = {launched.pid, *map(int, Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split())}
        assert len(pids) == 3
        assert _listening(pids) == []
        variables = [Path("/proc", str(pid), "environ").read_bytes().decode().split("\0") for pid in pids]
        (folder,) = {line.partition("=")[2] for own in variables for line in own if "LAUNCH_FOLDER=" in line}
        stranger = ["/usr/bin/env", "python3", "-c", STRANGER, str(folder)]
        environment = {"PATH": os.environ["PATH"], "PIDS": " ".join(map(str, pids))}
        own, other = (
            subprocess.run([*before, *stranger], env=environment, capture_output=True, text=True)
            for before in ((), ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))
        )
        assert str(folder) in own.stdout and "LCMLORA_PEERS" in own.stdout
        assert (other.returncode, other.stdout) == (0, "")
