"""An encoding whose driver and workers are killed at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Launch
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.latents.shard_encoding import Shard, ShardEncoder
from lcmlora.data.sources.source import survey, write_records
from tests.data.conftest import add, data_in, load_encoders, picture
from tests.support.latents import LARGE, SETTINGS, tree

ROOT = Path(__file__).parents[2]
KILLS, SECONDS = 20, 6.0


@dataclass(frozen=True)
class LoadSlow:
    """Loads encoders of a miniature that take their time, and writes the name of every shard that is begun to a log."""

    folder: Path
    log: Path

    def __call__(self) -> LoadedBase:
        torch.set_num_threads(1)
        real = ShardEncoder.__call__

        def encode(self_: ShardEncoder, shard: Shard) -> object:
            with self.log.open("a") as file:
                file.write(f"{shard.name}\n")
            time.sleep(0.7)
            return real(self_, shard)

        ShardEncoder.__call__ = encode  # type: ignore[assignment, method-assign]
        return load_encoders(self.folder, LARGE)


def drive() -> None:
    """Encodes what is in the folder of the first argument, with the base in the folder of the second one."""
    work, base_folder = Path(sys.argv[1]), Path(sys.argv[2])
    paths = (work / "pictures", work / "scratch", work / "many")
    load = LoadSlow(base_folder, work / "log")
    base = load_encoders(base_folder, LARGE)
    encode_latents(base, data_in(work / "in"), SETTINGS, *paths, Launch(processes=2), load)


@pytest.mark.slow
def test_twenty_kills_cost_nothing_but_the_shards_under_way(base_folder: Path, tmp_path: Path) -> None:
    for number in range(240):
        add(tmp_path / "in", f"{number:03d}.png", f"subject {number % 8}", picture(number, (40, 44)))
    data = data_in(tmp_path / "in")
    write_records(tmp_path / "pictures" / "train.jsonl", survey(data).records)
    torch.set_num_threads(1)
    paths = (tmp_path / "pictures", tmp_path / "scratch")
    encode_latents(load_encoders(base_folder, LARGE), data, SETTINGS, *paths, tmp_path / "alone")
    shards = {path.name for path in (tmp_path / "alone").glob("shard-*")}
    assert len(shards) == 16

    def begun() -> list[str]:
        return (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []

    def finished() -> set[str]:
        return {path.stem for path in (tmp_path / "scratch").glob("*/done/shard-*.json")}

    numbers, kills, lost = random.Random(0), 0, 0
    script = "from tests.data.test_encode_kills import drive; drive()"
    command = [sys.executable, "-c", script, str(tmp_path), str(base_folder)]
    while True:
        driver = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        found, before = finished(), len(begun())
        while driver.poll() is None:
            time.sleep(numbers.uniform(0, SECONDS))
            if kills < KILLS and driver.poll() is None:
                victims = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children()]
                victim = numbers.choice(victims)
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGKILL)
                kills += 1
                lost += 2 if victim.pid == driver.pid else 1  # shards under way, at most
                time.sleep(0.5)
        # What was finished when this driver began was not begun again.
        assert not found & set(begun()[before:])
        if (tmp_path / "many").exists():
            assert tree(tmp_path / "many") == tree(tmp_path / "alone")
            if kills == KILLS:
                break
            (tmp_path / "log").unlink()
            for path in (tmp_path / "many").iterdir():
                path.unlink()
            (tmp_path / "many").rmdir()
            lost = 0
    assert driver.returncode == 0
    assert set(begun()) == shards and len(begun()) <= len(shards) + lost
    assert list((tmp_path / "scratch").iterdir()) == []
