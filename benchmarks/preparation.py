"""What `prepare` takes: its pace, and its memory for millions of records. Part of benchmarks.scaling.

The pace is that of reading a folder of pictures of 256 pixels. For the memory, records are made up and nothing is
decoded (tests/support/synthetic.py): then millions of them take minutes, and all else is as it is with pictures.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import tables

DECODED = 4_000  # pictures
RECORDS = (20_000, 2_000_000, 4_000_000)
HASHES = (250_000, 1_000_000)
BITS = 6  # in which near duplicates may differ
SIZES = (10_000, 1_000_000, 12_000_000, 100_000_000)
CORES = 16  # assumed

_TURNS = 3


def measure() -> dict[str, Any]:
    found: dict[str, Any] = {"decoded": {}, "records": []}
    with tempfile.TemporaryDirectory() as folder:
        _draw_pictures(Path(folder))
        turns = [{decoders: _in_a_process("decode", decoders, folder) for decoders in (1, 2)} for _ in range(_TURNS)]
        for decoders in (1, 2):
            found["decoded"][str(decoders)] = {
                key: DECODED / statistics.median(turn[decoders][key] for turn in turns)
                for key in ("seconds", "processor")
            }
    for count in RECORDS:
        with tempfile.TemporaryDirectory() as folder:
            found["records"].append(_in_a_process("records", count, folder))
    found["hashes"] = [_compare(count) for count in HASHES]
    return found


def _draw_pictures(folder: Path) -> None:
    from PIL import Image

    numbers = np.random.default_rng(0)
    for number in range(DECODED):
        few = Image.fromarray(numbers.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        few.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=90)
        (folder / f"{number:05d}.txt").write_text(f"subject {number}")


def _in_a_process(work: str, count: int, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.preparation", work, str(count), folder]
    answer = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(answer.stdout))


def decode(decoders: int, folder: str) -> dict[str, float]:
    """Returns the seconds that `prepare` takes with so many decoders, and those of processor time of all processes."""
    from lcmlora.config import Data
    from lcmlora.data.preparation import working
    from lcmlora.data.prepare import prepare_pictures

    data = Data.model_validate({"source": "folder", "path": folder})
    with tempfile.TemporaryDirectory() as out, mock.patch.object(working, "default_decoders", lambda: decoders):
        began = time.perf_counter()
        with _Peaks() as peaks:
            prepare_pictures(data, 1, Path(out, "pictures"))
        return {"seconds": time.perf_counter() - began, "processor": peaks.processor}


def records(count: int, folder: str) -> dict[str, Any]:
    """Prepares so many made up records with two processes."""
    from lcmlora.config import Data, Launch
    from lcmlora.data import prepare
    from lcmlora.plugins import SOURCES
    from tests.support.synthetic import SHARD, Synthetic

    SOURCES.register("synthetic", Synthetic)
    data = Data.model_validate({"source": "synthetic", "path": f"{count} pictures"})
    scratch, read = Path(folder, "scratch"), list[float]()
    merge = prepare._merge

    def timed(*arguments: Any) -> Any:
        read.append(time.perf_counter() - began)
        return merge(*arguments)

    began = time.perf_counter()
    with _Peaks() as peaks, mock.patch.object(prepare, "_merge", timed):
        report = prepare.prepare_pictures(
            data, 1, Path(folder, "pictures"), scratch=scratch, launch=Launch(processes=2)
        )
    return {
        "records": report["read"],
        "shards": -(-count // SHARD),
        "read": read[0],
        "merged": time.perf_counter() - began - read[0],
        "driver": peaks.driver,
        "worker": peaks.worker,
        "scratch": sum(path.stat().st_size for path in scratch.rglob("*.gz")),
    }


class _Peaks:
    """The largest memory (RSS, in bytes) of this process, and of any process that it has started; and the processor
    time of all of them, in seconds."""

    def __init__(self) -> None:
        self.driver = self.worker = 0
        self.processor = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.driver = max(self.driver, _memory(os.getpid()))
            others = _descendants(os.getpid())
            self.worker = max([self.worker, *map(_memory, others)])
            self.processor = max(self.processor, sum(map(_processor_time, [os.getpid(), *others])))


def _memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def _processor_time(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    except OSError:  # it has ended
        pass
    return found


def _compare(count: int) -> dict[str, float]:
    """Seeks near duplicates among random hashes, none of which is near another."""
    from lcmlora.data.preparation.near_duplicates import BLOCK, find_near_duplicates

    hashes = np.random.default_rng(0).integers(0, 1 << 64, count, dtype=np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        blocks = (hashes[start : start + BLOCK] for start in range(0, count, BLOCK))
        for _ in find_near_duplicates(blocks, BITS, Path(folder, "kept")):
            pass
        return {"hashes": count, "seconds": time.perf_counter() - began}


def show(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{each['records']:,}",
            f"{each['shards']:,}",
            *(f"{each[key]:,.0f}" for key in ("read", "merged")),
            *(f"{each[key] / 1e6:,.0f}" for key in ("driver", "worker", "scratch")),
        ]
        for each in found["records"]
    ]
    head = ["records", "shards", "read, s", "merged, s", "driver, peak MB", "a worker, peak MB", "scratch, MB"]
    memory = tables.markdown(head, rows)
    largest = found["records"][-1]
    one, two = (found["decoded"][decoders] for decoders in ("1", "2"))
    pace, merging = one["processor"], largest["merged"] / largest["records"]
    rows = [
        [
            f"{count:,}",
            f"{count / pace / 3600:,.2f}",
            f"{count / pace / 3600 / CORES:,.2f}",
            f"{count * merging / 3600:,.2f}",
            f"{count / 8 * 2 / 1e6:,.1f}",
            f"{count * largest['scratch'] / largest['records'] / 1e9:,.1f}",
        ]
        for count in SIZES
    ]
    head = ["pictures", "decoding, core h", f"on {CORES} cores, h", "merge, h", "bits of duplicates, MB", "scratch, GB"]
    few, many = found["hashes"]
    return (
        f"`prepare` reads {one['processor']:,.0f} pictures of 256 pixels in a second of processor time with one "
        f"decoder, and {two['processor']:,.0f} with two, its start included ({DECODED:,} pictures in a folder). "
        f"Two cores that other work shared read {one['seconds']:,.0f} and {two['seconds']:,.0f} in a second.\n\n"
        f"`prepare` of made up records, nothing decoded, with two workers on two cores:\n\n{memory}\n"
        f"What follows from that for larger sets; 100,000,000 pictures are 10,000 shards, of which "
        f"{largest['shards']:,} were run:\n\n{tables.markdown(head, rows)}\n"
        f"Near duplicates (`data.near_duplicates: {BITS}`) are sought in {few['seconds']:.0f} s among "
        f"{few['hashes']:,} pictures and in {many['seconds']:.0f} s among {many['hashes']:,}.\n"
    )


if __name__ == "__main__":
    print(json.dumps({"decode": decode, "records": records}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])))
