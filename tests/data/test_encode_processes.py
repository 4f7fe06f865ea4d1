"""Workers that encode one cache together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.cli.stages.loading import refuse_ranks
from lcmlora.config import Data, Launch
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.latents.shard_encoding import MakeShardEncoder
from lcmlora.data.latents.store import ShardWriter, UnfinishedCache
from lcmlora.errors import UserError
from tests.data.conftest import load_encoders
from tests.support.latents import LARGE, SETTINGS, Load, count_batches, run, tree


@dataclass(frozen=True)
class LoadOnce:
    """Loads encoders of a miniature; the first worker that has loaded them dies at its second batch."""

    folder: Path
    resolution: int
    marks: Path

    def __call__(self) -> LoadedBase:
        base = load_encoders(self.folder, self.resolution)
        sizes = count_batches(base)
        counted = base.encode_pictures

        def encode(pictures: object) -> object:
            with (self.marks / str(os.getpid())).open("w") as file:
                file.write(str(len(sizes) + 1))
            if len(sizes) == 1 and self._first():
                os.kill(os.getpid(), signal.SIGKILL)
            return counted(pictures)

        base.encode_pictures = encode  # type: ignore[method-assign, assignment]
        return base

    def _first(self) -> bool:
        try:
            (self.marks / "killed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @property
    def batches(self) -> int:
        """The batches that were begun in all workers."""
        return sum(int(path.read_text()) for path in self.marks.iterdir() if path.name.isdigit())


def encode_with(load: Callable[[], LoadedBase], base: LoadedBase, data: Data, work: Path, out: str) -> Path:
    paths = (work / "pictures", work / "scratch", work / out)
    encode_latents(base, data, SETTINGS, *paths, Launch(processes=2), load)
    return work / out


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_write_the_bytes_that_one_process_writes(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    alone = run(load_base(LARGE), listed, tmp_path, out="alone")
    load = LoadOnce(base_folder, LARGE, tmp_path / "marks")
    load.marks.mkdir()
    base = load_base(LARGE)
    own = count_batches(base)
    assert tree(encode_with(load, base, listed, tmp_path, "two")) == tree(alone)
    assert own == []
    # 40 pictures in batches of 5, and the two that the killed worker had begun once more.
    assert load.batches == 8 + 2
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.slow
def test_workers_go_on_where_a_killed_process_was(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    base = load_base(LARGE)
    count_batches(base, fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    load = LoadOnce(base_folder, LARGE, tmp_path / "marks")
    load.marks.mkdir()
    (load.marks / "killed").touch()
    assert tree(encode_with(load, base, listed, tmp_path, "latents/mini")) == tree(undisturbed)
    assert load.batches == 8 - 3  # the first of three shards was there


def test_a_worker_whose_base_has_another_precision_is_refused(load_base: Load, listed: Data, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "", None)
    make = MakeShardEncoder(partial(load_base, LARGE), torch.bfloat16, listed, None, 5, writer)
    with pytest.raises(UserError, match=r"mini: a worker would encode in torch\.float32 on its cpu, and the captions"):
        make()


def test_workers_that_see_another_disk_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"key": torch.zeros(3, 16, dtype=torch.uint8)}
    with pytest.raises(UserError, match=r"files: is not on .*need one folder for all, or shards .*\(encode\.shards\)"):
        ShardWriter(tmp_path / "elsewhere" / "files", "", None).write("shard-00000.safetensors", rows, "")
    (tmp_path / "node").mkdir()
    shard = ShardWriter(tmp_path / "node", "", None).write("shard-00000.safetensors", rows, "")
    monkeypatch.setattr("lcmlora.data.latents.store._VISIBLE_SECONDS", 0.0)
    with pytest.raises(
        UserError, match=r"files/shard-00000\.safetensors: is not there, though a worker has written it"
    ):
        UnfinishedCache(tmp_path / "driver", "").add(*shard)


def test_processes_of_torchrun_are_told_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_ranks("encode")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="encode: was started in 4 processes; start it once, `lcmlora encode`"):
        refuse_ranks("encode")
