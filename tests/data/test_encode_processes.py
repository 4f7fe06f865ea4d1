"""Many processes that encode one cache together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data
from lcmlora.data.latents.encode import encode_latents
from lcmlora.errors import UserError
from lcmlora.parallel import ranks
from lcmlora.parallel.ranks import Ranks
from tests.data.conftest import load_encoders
from tests.support.latents import LARGE, SETTINGS, Load, count_batches, run, tree


def _encode_as(rank: int, environment: dict[str, str], dies: bool, load: Callable[[], LoadedBase], *rest: Any) -> None:
    """One of the processes: what a launcher would set is in `environment`."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    base = load()
    if dies:
        base.encode_pictures = lambda pictures: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with ranks.connected("cpu") as place:
        encode_latents(base, *rest, place)


def encode_in(processes: int, folder: Path, data: Data, tmp_path: Path, out: str, killed: int | None = None) -> Path:
    """Encodes in so many processes that talk over gloo; process `killed` dies at its first batch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once, not in each of them
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rest = (data, SETTINGS, tmp_path / "pictures", tmp_path / "scratch", tmp_path / out)
    load = partial(load_encoders, folder, LARGE)
    started = [
        context.Process(target=_encode_as, args=(rank, environment, rank == killed, load, *rest))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    failed = [process.exitcode != 0 for process in started]
    assert failed == [killed is not None] * processes
    return tmp_path / out


@pytest.mark.slow
def test_two_processes_write_the_bytes_that_one_writes(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    alone = run(load_base(LARGE), listed, tmp_path, out="alone")
    assert tree(encode_in(2, base_folder, listed, tmp_path, "two")) == tree(alone)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_three_others_finish(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    base = load_base(LARGE)
    count_batches(base, fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    assert tree(encode_in(3, base_folder, listed, tmp_path, "three")) == tree(undisturbed)


@pytest.mark.slow
def test_one_process_encodes_only_what_the_killed_one_of_two_had_to(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    encode_in(2, base_folder, listed, tmp_path, "latents/mini", killed=1)
    assert not (tmp_path / "latents").exists()
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert tree(run(base, listed, tmp_path)) == tree(undisturbed)
    assert sizes == [5] * 3  # the second of three shards


def test_processes_with_scratch_folders_of_their_own_are_told_so(
    load_base: Load, listed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(into: list[object], mine: object) -> None:
        into[:] = [mine, mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr("lcmlora.data.latents.store._VISIBLE_SECONDS", 0.0)
    rest = (listed, SETTINGS, tmp_path / "pictures", tmp_path / "scratch", tmp_path / "latents/mini")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: is not there.*one and the same scratch folder"):
        encode_latents(load_base(LARGE), *rest, Ranks(0, 2))
    assert not (tmp_path / "latents").exists()
