"""Training in many processes: real ones, which talk over gloo."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lcmlora import checkpoint, lora, ranks
from lcmlora.config import Launch
from lcmlora.data.cache import LatentCache
from lcmlora.errors import UserError
from lcmlora.ranks import Ranks

ROOT = Path(__file__).parents[1]


def _train(processes: int, base: Path, cache: LatentCache, work: Path, kill_at: int = -1, victim: str = "self") -> int:
    """Returns the exit status of `processes` trainers."""
    script = "import sys; from lcmlora import ranks; from lcmlora.config import Launch; "
    script += f"sys.exit(ranks.launch(Launch(processes={processes}), 'tests.trainer', sys.argv[1:]))"
    arguments = [str(base), str(cache._folder), str(work), str(kill_at), victim]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, env=environment).returncode


@pytest.fixture(scope="module")
def adapters(base_folder: Path, cache: LatentCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `1` and `2` of undisturbed runs in as many processes, of the same number of pictures in a step."""
    root = tmp_path_factory.mktemp("adapters")
    for processes in (1, 2):
        assert _train(processes, base_folder, cache, root / str(processes)) == 0
    return root


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
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
    until = time.monotonic() + 10
    for rank in ("0", "1"):
        while time.monotonic() < until:
            with contextlib.suppress(UserError), checkpoint.locked(tmp_path / "scratch" / rank):
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


def test_a_run_of_one_process_goes_on_in_two(adapters: Path, base_folder: Path, cache: LatentCache, tmp_path: Path):
    assert _train(1, base_folder, cache, tmp_path, kill_at=4) != 0
    assert _train(2, base_folder, cache, tmp_path) == 0
    one, both = (load_file(folder / "adapter" / lora.WEIGHTS) for folder in (adapters / "1", tmp_path))
    for name in one:
        torch.testing.assert_close(both[name], one[name], atol=1e-5, rtol=0)


def test_alone_there_is_nothing_to_exchange():
    place, tensor = Ranks(), torch.ones(2)
    place.add_up(tensor)
    place.agree(anything=1)
    place.wait()
    assert tensor.tolist() == [1, 1] and place.first and not ranks.launched()


def test_processes_with_different_files_are_told_which(monkeypatch: pytest.MonkeyPatch):
    def gather(into: list[object], mine: object) -> None:
        into[:] = [{"latent_cache": "a" * 4}, {"latent_cache": "b" * 4}]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(UserError, match="process 1 has 'bbbb' as latent cache, process 0 has 'aaaa'"):
        Ranks(0, 2).agree(latent_cache="aaaa")


def test_many_machines_need_a_place_to_meet():
    with pytest.raises(ValueError, match=r"rendezvous \(host:port\) is needed for 2 machines"):
        Launch(machines=2)
