"""How costs grow: python -m benchmarks.growth [MODEL] [--json FILE]

It measures a step by batch, rank and resolution; drawing by batch, with the adapter merged into the weights or beside
them; preparing pictures by cores; and the start of the command line, of DVC and of the flow. The values of a table take
turns, so that a machine that slows down slows all of them; figures are medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.compare import Case, make_case, write_pictures
from benchmarks.variants import Build
from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.adapters.metadata import Sampler
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion import sampling

_TURNS = 5
_DRAWN = 32  # pictures


def in_turns(runs: dict[str, Callable[[], object]], turns: int = _TURNS) -> dict[str, float]:
    """Returns the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def steps(case: Case, work: Path) -> dict[str, dict[str, Any]]:
    """Returns pictures/s of the step with other batches, ranks and resolutions."""
    device = bases.pick_device("auto")
    dtype = bases.pick_dtype(case.distill.precision, device)

    def step(**changes: Any) -> Callable[[], object]:
        side = changes.pop("resolution", case.base.resolution)
        other = dataclasses.replace(
            case,
            base=case.base.model_copy(update={"resolution": side}),
            distill=case.distill.model_copy(update=changes),
        )
        cache = LatentCache(case.data / "latents")
        if side != case.base.resolution:
            factor = side / case.base.resolution
            for parts in cache._latents.values():  # no cost depends on what they show
                parts[0] = torch.nn.functional.interpolate(parts[0].float(), scale_factor=factor).half()
        built = Build(other, device, dtype, cache, compiled=False).step()
        return lambda: built(0)

    found = {}
    batches = {f"batch {n}": step(batch=n) for n in (1, 4, 16, 32)}
    ranks = {f"rank {n}": step(rank=n, alpha=n) for n in (4, 16, 64, 128)}
    side = case.base.resolution
    sides = {f"{n} px": step(resolution=n) for n in (side // 2, side, 2 * side)}
    for group in (batches, ranks, sides):
        for name, seconds in in_turns(group).items():
            count = int(name.split()[1]) if name.startswith("batch") else case.distill.batch
            found[name] = {"pictures_per_second": count / seconds}
    return found


def drawing(case: Case) -> dict[str, dict[str, Any]]:
    """Returns pictures/s of 4 steps of the student, with its adapter merged or beside, and in other batches."""
    device = bases.pick_device("auto")
    dtype = bases.pick_dtype(case.distill.precision, device)
    base = bases.load(case.model, case.base, case.folder, device=device, dtype=dtype)
    alone = bases.load(case.model, case.base, case.folder, device=device, dtype=dtype, parts=("network",))
    lora.inject(alone.network, case.distill.rank, case.distill.alpha, 0)
    layers = {
        name: (layer.lora_A[lora.ADAPTER].weight.detach(), layer.lora_B[lora.ADAPTER].weight.detach())
        for name, layer in lora._layers(alone.network)
    }
    conditioning = sampling.text_conditioning(base, ["red apple"] * _DRAWN)
    noise = sampling.initial_noise(base.latent_shape, 0, range(_DRAWN))

    sampler = Sampler(grid=case.distill.grid)

    def draw(unet: Any, size: int) -> Callable[[], object]:
        def drawn() -> None:
            base.network = unet
            for start in range(0, _DRAWN, size):
                rows = slice(start, start + size)
                part = {name: value[rows] for name, value in conditioning.items()}
                indices = range(start, start + size)
                latents = sampling.sample_student(base, part, noise[rows], steps=4, indices=indices, sampler=sampler)
                base.decode(latents)

        return drawn

    bare = base.network
    runs = {f"beside, batch {size}": draw(alone.network, size) for size in (1, 8, 32)}
    runs |= {f"merged, batch {size}": draw(bare, size) for size in (1, 8, 32)}
    with lora.applied(bare, layers, "random"):
        found = in_turns(runs)
    return {name: {"pictures_per_second": _DRAWN / seconds} for name, seconds in found.items()}


def preparing(work: Path, count: int = 2000) -> dict[str, dict[str, Any]]:
    """Returns pictures/s of `prepare` on one core and on all."""
    write_pictures(work / "many", count, 256)
    code = (
        "import os, sys; os.sched_setaffinity(0, range(int(sys.argv[2])));"
        "from pathlib import Path; from benchmarks.compare import data_settings;"
        "from lcmlora.data.prepare import prepare_pictures;"
        "prepare_pictures(data_settings(Path(sys.argv[1])), 1, Path(sys.argv[1] + '-out'))"
    )

    def run(cores: int) -> Callable[[], object]:
        command = [sys.executable, "-c", code, str(work / "many"), str(cores)]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    empty = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", "import benchmarks.compare, lcmlora.data.prepare"], check=True, capture_output=True
    )
    cores = sorted({1, os.cpu_count() or 1})
    found = in_turns({"imports": empty} | {f"{n} cores": run(n) for n in cores}, 3)
    start = found.pop("imports")
    return {name: {"pictures_per_second": count / (seconds - start)} for name, seconds in found.items()}


def starting(model: str) -> dict[str, dict[str, Any]]:
    """Returns the seconds of each start."""
    python, scripts = sys.executable, Path(sys.executable).parent
    commands: dict[str, Sequence[str]] = {
        "python": [python, "-c", "pass"],
        "lcmlora --help": [str(scripts / "lcmlora"), "--help"],
        "lcmlora check": [str(scripts / "lcmlora"), "check"],
        "imports of a stage that trains": [
            python,
            "-c",
            "import lcmlora.distillation.distill, diffusers.models.unets.unet_2d_condition",
        ],
        "imports of the flow": [python, "-c", "import lcmlora.flows.retrain"],
        "dvc status of a stage": [python, "-m", "dvc", "status", f"encode@{model}"],
    }
    quiet = {"check": True, "capture_output": True, "env": os.environ | {"DVC_NO_ANALYTICS": "1"}}

    def run(command: Sequence[str]) -> Callable[[], object]:
        return lambda: subprocess.run(command, **quiet)  # type: ignore[call-overload]

    found = in_turns({name: run(command) for name, command in commands.items()})
    return {name: {"seconds": seconds} for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--random", action="store_true", help="random weights instead of the base's own")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lcmlora-growth-") as folder:
        work = Path(folder)
        case = make_case(options.model, None, work, random=options.random, compiled=False, device="auto")
        found = {"step": steps(case, work), "drawing": drawing(case), "prepare": preparing(work)}
        found["starting"] = starting(options.model)
    for name, rows in found.items():
        unit = next(iter(next(iter(rows.values()))))
        print(tables.markdown([name, unit.replace("_", " ")], [[k, f"{v[unit]:.3g}"] for k, v in rows.items()]))
    if options.json:
        from lcmlora.io.files import write_json

        write_json(options.json, found)


if __name__ == "__main__":
    main()
