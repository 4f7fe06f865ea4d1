"""Kills, processes and memory of `lcmlora encode`: python -m benchmarks.encoding [--kills 20] [--json FILE]

A project in miniature (tests/support/miniature.py) with many pictures of 16 pixels runs `lcmlora encode` as DVC does.
Kills: SIGKILL goes to all its processes at moments that are uniform over the time of an undisturbed run. It is started
again at once, and in the end the cache must have the same bytes as the undisturbed one. Processes: pictures/s of the
whole command with one and with two processes, in turns. Memory: the peak of the process by the number of pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import tables
from lcmlora.data.sources.source import Record, write_records
from lcmlora.io.files import sha256_folder, write_json
from tests.data.conftest import picture
from tests.support import projects
from tests.support.miniature import RESOLUTION, save_base

MODEL = "sd15"
_FILES = 2000  # a longer list names them again


class Project:
    """A folder in which `lcmlora encode` runs.

    Args:
        count: pictures in its list.
        changes: of `encode` and `launch` in params.yaml.
    """

    def __init__(self, root: Path, base: Path, files: Path, count: int, **changes: dict[str, Any]) -> None:
        self.root = root
        root.mkdir(parents=True)
        raw = projects.make(root, lambda architecture: base, "sqlite:///mlflow.db", MODEL)
        raw["data"]["path"] = str(files)
        raw["encode"] |= {"batch": 64, "shard_mb": 1, "device": "cpu"} | changes.get("encode", {})
        raw["launch"] |= changes.get("launch", {})
        (root / "params.yaml").write_text(yaml.safe_dump(raw))
        (root / "bases").mkdir()
        (root / "bases" / MODEL).symlink_to(base)
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files.iterdir())}
        names = list(digests)
        records = [
            Record(name, f"subject {number % 100}", digests[name], RESOLUTION, RESOLUTION)
            for number in range(count)
            for name in (names[number % len(names)],)
        ]
        (root / "data" / "pictures").mkdir(parents=True)
        write_records(root / "data" / "pictures" / "train.jsonl", records)

    @property
    def latents(self) -> Path:
        return self.root / "data" / "latents" / MODEL

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lcmlora", "encode", MODEL]
        with (self.root / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.root, stdout=log, stderr=log, start_new_session=True)

    def run(self) -> tuple[float, int]:
        """Returns the seconds of a run, and the bytes of its process's peak. Raises RuntimeError where it fails."""
        began = time.monotonic()
        process = self.start()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError((self.root / "log").read_text()[-2000:])
        return time.monotonic() - began, usage.ru_maxrss * 1024


def kills(work: Path, base: Path, files: Path, count: int, pictures: int, seed: int) -> dict[str, Any]:
    """Returns the numbers of kills and runs, and whether the caches have the bytes of an undisturbed one."""
    whole, killed = (Project(work / name, base, files, pictures) for name in ("whole", "killed"))
    seconds, _ = whole.run()
    numbers, done, runs, caches = random.Random(seed), 0, 0, 0
    expected, same = sha256_folder(whole.latents), True
    shards = len(list(whole.latents.glob("shard-*")))
    kept = 0  # shards that a started run found finished
    while done < count:
        process, runs = killed.start(), runs + 1
        until = time.monotonic() + numbers.uniform(0, seconds)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            kept += len(list(killed.root.glob("scratch/encode/*/done/shard-*")))
            continue
        if process.returncode:
            raise RuntimeError((killed.root / "log").read_text()[-2000:])
        caches += 1
        same = same and sha256_folder(killed.latents) == expected
        shutil.rmtree(killed.latents)
    killed.run()
    same = same and sha256_folder(killed.latents) == expected
    left = [path.name for path in (killed.root / "scratch" / "encode").glob("*")]
    return {
        "kills": done,
        "runs": runs + 1,
        "caches": caches + 1,
        "shards": shards,
        "finished shards found at kills": kept,
        "the undisturbed bytes": same,
        "left in scratch": len(left),
        "seconds undisturbed": round(seconds, 1),
    }


def processes(work: Path, base: Path, files: Path, pictures: int, turns: int) -> dict[str, Any]:
    """Returns the median seconds of a run with one and with two processes, and the pictures/s beyond starting."""
    found: dict[str, Any] = {}
    many = {n: Project(work / f"p{n}", base, files, pictures, launch={"processes": n}) for n in (1, 2)}
    few = {n: Project(work / f"f{n}", base, files, 128, launch={"processes": n}) for n in (1, 2)}
    seconds: dict[tuple[int, bool], list[float]] = {}
    for _ in range(turns):
        for n in (1, 2):
            for project, whole in ((few[n], False), (many[n], True)):
                seconds.setdefault((n, whole), []).append(project.run()[0])
                shutil.rmtree(project.latents)
    for n in (1, 2):
        all_pictures, start = (statistics.median(seconds[n, whole]) for whole in (True, False))
        rate = (pictures - 128) / (all_pictures - start)
        found[str(n)] = {"seconds": all_pictures, "starting": start, "pictures/s": rate}
    return found


def memory(work: Path, base: Path, files: Path, counts: list[int]) -> dict[str, int]:
    """Returns the bytes of the peak by the number of pictures."""
    return {str(n): Project(work / f"m{n}", base, files, n).run()[1] for n in counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=8000, help="of the runs that are killed or timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="*", default=[2000, 20_000, 100_000], help="for memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lcmlora-encoding-") as folder, contextlib.chdir(folder):
        work = Path(folder)
        base, files = save_base(work / "base", MODEL), work / "files"
        files.mkdir()
        for number in range(_FILES):
            picture(number, (RESOLUTION, RESOLUTION)).save(files / f"{number:04d}.png")
        found: dict[str, Any] = {"kills": kills(work, base, files, options.kills, options.pictures, options.seed)}
        print(tables.markdown(["killed", ""], [[name, str(value)] for name, value in found["kills"].items()]))
        found["processes"] = processes(work, base, files, options.pictures, options.turns)
        rows = [
            [n, f"{each['seconds']:.1f}", f"{each['starting']:.1f}", f"{each['pictures/s']:.0f}"]
            for n, each in found["processes"].items()
        ]
        print(tables.markdown(["processes", "seconds", "of which starting", "pictures/s after that"], rows))
        found["memory"] = memory(work, base, files, options.counts)
        print(tables.markdown(["pictures", "peak, MB"], [[n, f"{b / 1e6:.0f}"] for n, b in found["memory"].items()]))
    if options.json:
        write_json(options.json, found)
    raise SystemExit(not found["kills"]["the undisturbed bytes"])


if __name__ == "__main__":
    main()
