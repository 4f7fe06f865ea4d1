"""lcmlora's step against the reference recipe's (reference.py), in turns: python -m benchmarks.compare --help

Both have the same base, adapter, pictures, batch and precision, each in a process of its own. First both train a few
steps on the same samples, from cached latents and text, and their losses are compared. Then they take turns: some steps
of the recipe as it is, some of its UNet part alone (latents and text cached, as lcmlora always has them), some of
lcmlora's. A ratio compares two runs of the same turn; the table has the median over the turns, and the range.

The base is that of params.yaml, or one of its size with random weights (--random), which costs the same. Both train by
the recipe's objective, latent consistency. Peak memory is that of tensors, as torch's allocators count.

    python -m benchmarks.compare                        # the emoji base, on this machine
    python -m benchmarks.compare sd15:1,4,16 sdxl:1,4 ssd1b:4 --random --seconds 2 --repeats 5      # on a GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from benchmarks import published, tables
from benchmarks.memory import most_allocated
from benchmarks.reference import Reference
from lcmlora import bases, config
from lcmlora.bases import fetching
from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.config import Base, Data, Distill
from lcmlora.data.latents import cache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.prepare import prepare_pictures
from lcmlora.data.sources.source import fit, open_picture, read_records
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.distillation.outcome import probe_inputs
from lcmlora.errors import UserError
from lcmlora.io.files import write_json
from lcmlora.training.checkpoint import BestWeights, Checkpoints
from lcmlora.training.execution import AdapterCheck
from lcmlora.training.loop import take_step

OURS, RECIPE, UNET = "lcmlora", "reference", "reference, UNet part alone"
_COMPARED = 4  # steps whose losses are compared
_SIDES = (OURS, RECIPE)  # the processes


@dataclass(frozen=True)
class Case:
    """The base, pictures and settings of a comparison."""

    model: str
    base: Base
    folder: Path  # of the base
    data: Path  # `prepared` and `latents` in it
    distill: Distill


@dataclass
class Result:
    """The figures of a case."""

    model: str
    batch: int
    device: str
    dtype: str
    threads: int
    steps: int  # of a turn
    rates: dict[str, list[float]] = field(default_factory=dict)  # pictures/s, of each turn
    peak_bytes: dict[str, int] = field(default_factory=dict)
    checkpoint_bytes: dict[str, int] = field(default_factory=dict)
    first_step_seconds: dict[str, float] = field(default_factory=dict)  # from the start of the process
    loss_difference: float = float("nan")  # largest, relative, over the samples of the steps that both made
    operations: dict[str, float] = field(default_factory=dict)  # of a step, in 1e12
    teraflops: float | None = None  # 1e12 operations per second in lcmlora's steps
    matmul_teraflops: float | None = None  # likewise in matrix products of this precision
    failed: dict[str, str] = field(default_factory=dict)

    def ratio(self, other: str) -> tuple[float, float, float]:
        """Returns the median, the lowest and the highest ratio of lcmlora's rate to the other's."""
        ratios = [a / b for a, b in zip(self.rates[OURS], self.rates[other], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


class _Side(ABC):
    """lcmlora or the recipe, in a process of its own, which `_serve` runs."""

    def __init__(self, case: Case) -> None:
        self.settings = case.distill
        self.device = bases.pick_device(self.settings.device)
        self.dtype = bases.pick_dtype(self.settings.precision, self.device)
        self.cache = cache.LatentCache(case.data / "latents")
        self.batches = sample_stream(self.cache, torch.arange(len(self.cache)), self.settings, self.device)
        self._done = 0

    def steps(self, mode: str, count: int) -> list[Tensor]:
        losses = []
        for _ in range(count):
            losses.append(self.step(mode, self._done))
            self._done += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return losses

    @abstractmethod
    def step(self, mode: str, step: int) -> Tensor:
        """Trains one step and returns its losses, one for each picture."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes a checkpoint."""

    def timed(self, mode: str, count: int) -> float:
        """Returns pictures/s."""
        began = time.perf_counter()
        self.steps(mode, count)
        return self.settings.batch * count / (time.perf_counter() - began)

    def first_losses(self, count: int) -> tuple[list[list[float]], float]:
        """Returns the losses of each of the first steps, and the age of the process in seconds after the first one."""
        losses = self.steps(UNET, 1)
        seconds = time.time() - psutil.Process().create_time()
        return [each.flatten().tolist() for each in losses + self.steps(UNET, count - 1)], seconds

    def peak(self, mode: str) -> int:
        """Returns the most bytes that tensors have within a step."""
        self.steps(mode, 1)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.steps(mode, 1)
            return torch.cuda.max_memory_allocated()
        return most_allocated(lambda: self.steps(mode, 1))

    def checkpoint(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            return sum(path.stat().st_size for path in Path(folder).rglob("*"))

    def operations(self, mode: str) -> float:
        """Returns the operations of a step's products, convolutions and attention, in 1e12."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.steps(mode, 1)
        return counter.get_total_flops() / 1e12

    def matmul_rate(self) -> float:
        """Returns what the device does in this precision, in 1e12 operations per second."""
        return _matmul_rate(self.device, self.dtype)


class _Ours(_Side):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        base = bases.load(case.model, case.base, case.folder, device=self.device, dtype=self.dtype, parts=("network",))
        check = AdapterCheck(base, *probe_inputs(base, self.batches.at(range(-2, 0), torch.zeros(2, dtype=torch.long))))
        self._optimization = add_adapter(base, self.settings)
        if self.settings.compile:  # a wrong step must not be measured
            check.compiled(self.batches.size, 2 * self.batches.size)
        self._distillation = Distillation(base, self.cache.unconditional(), self.settings)

    def step(self, mode: str, step: int) -> Tensor:
        losses, _ = take_step(self._distillation, self._optimization, self.batches, self.settings, step)
        return losses

    def save(self, path: Path) -> None:
        state = self._optimization.state()
        best: BestWeights = {"step": 0, "loss": 0.0, "weights": state["average"]}
        Checkpoints(path).save({"step": 0, "loss": 0.0, "best": best, "history": {}, "optimization": state})


class _Recipe(_Side):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        student, teacher = (
            bases.load(case.model, case.base, case.folder, device=self.device, parts=("network",)) for _ in range(2)
        )
        coder = bases.load(
            case.model, case.base, case.folder, device=self.device, dtype=self.dtype, parts=("vae", "text")
        )
        student.vae, student.tokenizers, student.text_encoders = coder.vae, coder.tokenizers, coder.text_encoders
        self._reference = Reference(student, teacher, self.settings, self.dtype)
        self._unconditional = {k: v.to(self.device) for k, v in self.cache.unconditional().items()}
        records = read_records(case.data / "prepared" / "train.jsonl")
        data = data_settings(case.data / "pictures")
        pixels = [
            np.asarray(fit(open_picture(data, r, size=case.base.resolution), case.base.resolution)[0]) for r in records
        ]
        self._pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
        self._captions = [record.caption for record in records]

    def step(self, mode: str, step: int) -> Tensor:
        batch = self.batches.draw(step)
        if mode == RECIPE:
            rows = self.batches.rows(self.batches.sample_indices(step, 0))
            batch = self._reference.encode(batch, self._pictures[rows], [self._captions[row] for row in rows.tolist()])
        return self._reference.step(batch, self._unconditional)

    def save(self, path: Path) -> None:
        trained = {n: p for n, p in self._reference.base.network.named_parameters() if p.requires_grad}
        torch.save({"adapter": trained, "optimizer": self._reference.optimizer.state_dict()}, path / "state.pt")


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns 1e12 operations per second of a large product, the best of a few."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(10 if device.type == "cuda" else 2):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / (10 if device.type == "cuda" else 2))
    return 2 * side**3 / best / 1e12


def _serve(name: str, case: Case, pipe: Connection) -> None:
    """Calls the methods of a side that come through the pipe and sends back what they return, until it is closed."""
    try:
        side = (_Ours if name == OURS else _Recipe)(case)
        pipe.send(None)
        while (call := pipe.recv()) is not None:
            method, arguments = call
            pipe.send(getattr(side, method)(*arguments))
            if side.device.type == "cuda":
                torch.cuda.empty_cache()  # for the other process
    except EOFError:
        pass  # the benchmark has ended, and nobody waits for an answer
    except (UserError, torch.OutOfMemoryError) as error:
        pipe.send(error)
    except Exception as error:
        traceback.print_exc()
        pipe.send(RuntimeError(str(error)))


class _Process:
    """A side in its process, as this process calls it."""

    def __init__(self, name: str, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, case, other_end), daemon=True)
        self._process.start()
        other_end.close()

    def ready(self) -> None:
        self._answer()

    def __call__(self, method: str, *arguments: object) -> Any:
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def compare_sides(case: Case, repeats: int, seconds: float) -> Result:
    """Returns the figures of a case.

    Args:
        repeats: turns.
        seconds: of a turn of the slowest side, about.
    """
    device = bases.pick_device(case.distill.device)
    dtype = bases.pick_dtype(case.distill.precision, device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    result = Result(
        case.model, case.distill.batch, device_name, str(dtype).removeprefix("torch."), torch.get_num_threads(), 0
    )
    sides, losses = {}, {}
    try:
        for name in _SIDES:  # one after the other: the time to the first step is measured
            sides[name] = _Process(name, case)
            sides[name].ready()
            losses[name], result.first_step_seconds[name] = sides[name]("first_losses", _COMPARED)
        a, b = (torch.tensor(losses[name]) for name in _SIDES)
        result.loss_difference = float(((a - b).abs() / b.abs()).max())
        for name, mode in ((OURS, OURS), (RECIPE, UNET), (RECIPE, RECIPE)):
            result.peak_bytes[mode] = sides[name]("peak", mode)
            result.checkpoint_bytes[name] = sides[name]("checkpoint")
        slowest = case.distill.batch / sides[RECIPE]("timed", RECIPE, 2)
        result.steps = max(2, round(seconds / slowest))
        for _ in range(repeats):
            for name, mode in ((RECIPE, UNET), (OURS, OURS), (RECIPE, RECIPE)):
                result.rates.setdefault(mode, []).append(sides[name]("timed", mode, result.steps))
        for name, mode in ((OURS, OURS), (RECIPE, UNET), (RECIPE, RECIPE)):
            result.operations[mode] = sides[name]("operations", mode)  # last, since the counter ends compiled execution
        result.matmul_teraflops = sides[OURS]("matmul_rate")
        result.teraflops = result.operations[OURS] * statistics.median(result.rates[OURS]) / case.distill.batch
    except torch.OutOfMemoryError as error:
        result.failed["memory"] = str(error).splitlines()[0]
    finally:
        for side in sides.values():
            side.end()
    return result


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def data_settings(folder: Path) -> Data:
    return Data.model_validate(
        {"source": "folder", "path": folder, "min_side": 16, "max_aspect": 2.0, "validation": 0.05, "seed": 0}
    )


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Writes captioned pictures of smooth colours; no cost depends on what they show."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"red apple, number {number}")


def make_case(
    model: str,
    batch: int | None,
    work: Path,
    *,
    random: bool,
    compiled: bool,
    device: str,
    precision: str | None = None,
) -> Case:
    """Fetches or makes the base, and prepares and encodes pictures for it."""
    settings = config.load(Path("params.yaml"))
    base, distill = settings.base(model), settings.distill_for(model)
    changes = {"objective": "lcm", "accumulate": 1, "cooldown": 0.0, "compile": compiled, "device": device}
    changes |= {"batch": batch or distill.batch, "precision": precision or distill.precision}
    distill = distill.model_copy(update=changes)
    if random:
        folder = work / "bases" / model
        if not folder.is_dir():
            published.save(model, folder)
        base = base.model_copy(update={"source": str(folder), "revision": None, "variant": None})
    else:
        folder = fetching.fetch(model, base, Path("bases"))
    data = work / f"{model}-{base.resolution}"
    if not data.is_dir():
        count = 64
        write_pictures(data / "pictures", count, base.resolution)
        source = data_settings(data / "pictures")
        prepare_pictures(source, 1, data / "prepared")
        place = bases.pick_device(device)
        dtype = bases.pick_dtype(distill.precision, place)
        loaded = bases.load(model, base, folder, device=place, dtype=dtype, parts=("vae", "text"))
        encoding = settings.encode_for(model).model_copy(update={"batch": 4})
        encode_latents(loaded, source, encoding, data / "prepared", data / "scratch", data / "latents")
    return Case(model, base, folder, data, distill)


def table(results: Sequence[Result]) -> str:
    head = ["base", "batch", "pictures/s", "reference", "ratio", "UNet part alone", "ratio", "peak memory", "reference"]
    head += ["ratio", "checkpoint", "reference", "first step", "reference", "operations", "loss differs by"]
    head += ["of the matmul rate"]
    rows = []
    for result in results:
        if result.failed:
            rows.append([result.model, str(result.batch), *(["does not fit"] + [""] * (len(head) - 3))])
            continue
        rates = {name: statistics.median(values) for name, values in result.rates.items()}
        ratios = {name: "{:.2f} ({:.2f} to {:.2f})".format(*result.ratio(name)) for name in (RECIPE, UNET)}
        peaks = result.peak_bytes
        rows.append(
            [
                result.model,
                str(result.batch),
                f"{rates[OURS]:.1f}",
                f"{rates[RECIPE]:.1f}",
                ratios[RECIPE],
                f"{rates[UNET]:.1f}",
                ratios[UNET],
                f"{peaks[OURS] / 1e6:.0f} MB",
                f"{peaks[RECIPE] / 1e6:.0f} MB",
                f"{peaks[OURS] / peaks[RECIPE]:.2f}",
                *(f"{result.checkpoint_bytes[name] / 1e6:.1f} MB" for name in _SIDES),
                *(f"{result.first_step_seconds[name]:.1f} s" for name in _SIDES),
                f"{result.operations[OURS] / result.operations[RECIPE]:.2f} of the reference's",
                f"{result.loss_difference:.0e}",
                f"{(result.teraflops or 0) / (result.matmul_teraflops or 1):.0%}",
            ]
        )
    return tables.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases",
        nargs="*",
        default=["emoji"],
        metavar="MODEL[:BATCH,...]",
        help="bases of params.yaml, with other batches than there if wanted",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn of the slowest side")
    parser.add_argument("--random", action="store_true", help="random weights instead of the base's own")
    parser.add_argument("--compile", action="store_true", help="lcmlora's UNet is compiled")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="of both; that of params.yaml by default")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="lcmlora-compare-") as work:
        for text in options.cases:
            model, _, batches = text.partition(":")
            for batch in map(int, batches.split(",")) if batches else [None]:
                case = make_case(
                    model,
                    batch,
                    Path(work),
                    random=options.random,
                    compiled=options.compile,
                    device=options.device,
                    precision=options.precision,
                )
                results.append(compare_sides(case, options.repeats, options.seconds))
                print(json.dumps(asdict(results[-1])), file=sys.stderr, flush=True)
            shutil.rmtree(Path(work, "bases", model), ignore_errors=True)
    first = results[0]
    print(f"{first.device}, {first.dtype}, {first.threads} threads, torch {torch.__version__}\n")
    print(table(results))
    if options.json:
        write_json(options.json, [asdict(result) for result in results])


if __name__ == "__main__":
    with reporting_errors():
        main()
