"""`lcmlora doctor`: before hours are spent, a real step and a validation at the chosen settings."""

from __future__ import annotations

import gc
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Distill, Launch
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.loss import Distillation, equip, samples
from lcmlora.distillation.validation import Validation
from lcmlora.errors import UserError
from lcmlora.patches import installed
from lcmlora.training.batches import split_rows
from lcmlora.training.execution import pick_checkpointing, recompute
from lcmlora.training.loop import take_step
from lcmlora.training.optimization import Optimization

_TIMED = 2  # steps, after one that warms up
_THRIFT = ("none", "selective", "full")
_BUFFERS = 5  # of the adapter's size in a checkpoint: weights, average, two moments, the best weights


@dataclass(frozen=True)
class Trial:
    """One way to run a step, and how it went: seconds and peak bytes, or neither where memory ran out."""

    accumulate: int
    checkpointing: str
    seconds: float | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Examination:
    """What a distillation at these settings will take. Sizes in bytes, times in seconds, for one process."""

    device: str
    memory: int | None  # of the GPU
    precision: str
    patches: list[str]  # what the UNet runs in a training step instead of its own code
    pictures: int
    captions: int
    validation_pictures: int
    epochs: float
    trials: list[Trial]  # the chosen settings first
    best: Trial
    images_per_second: float  # over all processes
    targets: float  # drawing up the validation, once
    validation: float  # looking at it, each time
    total: float
    checkpoint: int
    free: int  # on the disk of the scratch folder

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def examine(base: LoadedBase, cache: LatentCache, settings: Distill, launch: Launch, scratch: Path) -> Examination:
    """Returns what these settings will take on this device.

    Args:
        base: bare, with its UNet and VAE; it has an adapter afterwards.

    Raises:
        UserError: too few pictures, too little disk, or too little memory; in the last case with settings that fit.
    """
    rows, held = split_rows(cache, settings)
    if len(rows) < settings.batch or not len(held):
        raise UserError(
            f"distill.batch: {settings.batch} is more than the {len(rows)} pictures to train on, or the {len(held)} to "
            "validate with are none"
        )
    # This process's share of a step, as if it were the only one.
    share = settings.model_copy(
        update={
            "batch": settings.batch // (launch.processes * launch.machines),
            "checkpointing": pick_checkpointing(settings.checkpointing, base.device),
        }
    )
    optimization = equip(base, share)
    patched = [str(each) for each in installed(base.network)]
    distillation = Distillation(base, cache.unconditional(), share)
    trials = _trials(distillation, optimization, cache, rows, share)
    best = min((trial for trial in trials if trial.seconds), key=lambda trial: trial.seconds or 0.0)

    recompute(base.network, "none")
    began = _now(base.device)
    size = max(1, share.batch // settings.accumulate)
    validation = Validation(distillation, cache, held, share, size, base.decode)
    drawn_up = _now(base.device)
    validation.loss(), validation.pictures()
    looked = _now(base.device) - drawn_up
    looks = -(-settings.steps // settings.validate_every)
    seconds = trials[0].seconds or 0.0
    checkpoint = _BUFFERS * 4 * sum(p.numel() for p in base.network.parameters() if p.requires_grad)
    examination = Examination(
        device=_device_name(base.device),
        memory=torch.cuda.get_device_properties(base.device).total_memory if base.device.type == "cuda" else None,
        precision=str(base.dtype).removeprefix("torch."),
        patches=patched,
        pictures=len(rows),
        captions=int(cache.captions().max()) + 1,
        validation_pictures=len(held),
        epochs=settings.steps * settings.batch / len(rows),
        trials=trials,
        best=best,
        images_per_second=settings.batch / seconds,
        targets=drawn_up - began,
        validation=looked,
        total=settings.steps * seconds + (drawn_up - began) + looks * looked,
        checkpoint=checkpoint,
        free=shutil.disk_usage(scratch).free,
    )
    if examination.free < 2 * checkpoint:
        raise UserError(
            f"{scratch}: a checkpoint takes {checkpoint / 1e6:.0f} MB, and its successor needs as much beside it; "
            f"{examination.free / 1e6:.0f} MB are free"
        )
    return examination


def _trials(
    distillation: Distillation, optimization: Optimization, cache: LatentCache, rows: Tensor, settings: Distill
) -> list[Trial]:
    """Returns how the chosen way to run a step went, and on a GPU how others did.

    Raises:
        UserError: memory ran out, with settings that fit if there are any.
    """
    base, device = distillation.base, distillation.base.device

    def attempt(trial: Trial) -> Trial:
        tried = settings.model_copy(update={"accumulate": trial.accumulate, "checkpointing": trial.checkpointing})
        recompute(base.network, trial.checkpointing)
        batches = samples(cache, rows, tried, device)
        _forget(device)
        try:
            take_step(distillation, optimization, batches, tried, 0)
            began = _now(device)
            for step in range(1, 1 + _TIMED):
                take_step(distillation, optimization, batches, tried, step)
        except torch.OutOfMemoryError:
            return trial
        return Trial(trial.accumulate, trial.checkpointing, (_now(device) - began) / _TIMED, _peak(device))

    chosen = attempt(Trial(settings.accumulate, settings.checkpointing))
    trials = [chosen]
    if device.type == "cuda" or not chosen.seconds:
        for other in _others(settings, fits=bool(chosen.seconds)):
            trials.append(attempt(other))
            if not chosen.seconds and trials[-1].seconds:
                break
    if not chosen.seconds:
        last = trials[-1]
        advice = "and neither does one at a time with full checkpointing"
        if last.seconds:
            advice = f"distill.accumulate: {last.accumulate} with distill.checkpointing: {last.checkpointing} does"
        raise UserError(
            f"{base.name}: {settings.batch // settings.accumulate} pictures at a time do not fit "
            f"{_device_name(device)}; {advice}"
        )
    return trials


def _others(settings: Distill, *, fits: bool) -> Iterator[Trial]:
    """Yields other ways to run a step, the fastest first: freer ones where the chosen one fits, else thriftier ones."""
    divisors = [a for a in range(1, settings.batch + 1) if settings.batch % a == 0]
    chosen = (settings.accumulate, _THRIFT.index(settings.checkpointing))
    for accumulate in divisors:
        for level, how in enumerate(_THRIFT):
            if (accumulate, level) == chosen:
                continue
            freer = accumulate <= chosen[0] and level <= chosen[1]
            thriftier = accumulate >= chosen[0] and level >= chosen[1]
            if freer if fits else thriftier:
                yield Trial(accumulate, how)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def show(examination: Examination, settings: Distill, name: str) -> None:
    """Prints the examination as a table."""
    from rich.console import Console
    from rich.table import Table

    e, chosen = examination, examination.trials[0]
    table = Table(show_header=False, title=f"distill {name}")
    memory = f", {e.memory / 1e9:.0f} GB" if e.memory else ""
    table.add_row("device", f"{e.device}{memory}, {e.precision}")
    table.add_row(
        "data",
        f"{e.pictures} pictures to train on, {e.epochs:.1f} epochs; {e.validation_pictures} to validate with; "
        f"{e.captions} captions in all",
    )
    for number, patch in enumerate(e.patches):
        table.add_row("" if number else "patches", patch)
    for trial in e.trials:
        how = f"accumulate {trial.accumulate}, checkpointing {trial.checkpointing}"
        went = f"{trial.seconds:.3g} s, peak {trial.peak / 1e9:.2f} GB" if trial.seconds and trial.peak else "no memory"
        table.add_row("a step" + (" as chosen" if trial is chosen else " with"), f"{how}: {went}")
    table.add_row("speed", f"{e.images_per_second:.3g} images/s")
    table.add_row("validation", f"{e.targets:.1f} s to draw up, {e.validation:.1f} s each time")
    table.add_row("in all", f"{e.total / 3600:.2f} h for {settings.steps} steps")
    table.add_row("checkpoint", f"{e.checkpoint / 1e6:.0f} MB every {settings.checkpoint_every} steps; "
                                f"{e.free / 1e9:.0f} GB free")  # fmt: skip
    if e.best is not chosen and chosen.seconds and e.best.seconds and e.best.seconds < 0.95 * chosen.seconds:
        table.add_row(
            "faster",
            f"distill.accumulate: {e.best.accumulate}, distill.checkpointing: {e.best.checkpointing} "
            f"({chosen.seconds / e.best.seconds:.2f} times)",
        )
    Console().print(table)
