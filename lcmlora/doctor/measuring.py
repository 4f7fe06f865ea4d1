"""`lcmlora doctor`: measures some training steps and a validation, and says what the whole distillation will take."""

from __future__ import annotations

import gc
import json
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lcmlora import bases
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Base, Distill, Launch
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.distillation.validation import Validation
from lcmlora.doctor.random_latents import random_cache
from lcmlora.errors import UserError
from lcmlora.patches import installed
from lcmlora.training.batches import split_rows
from lcmlora.training.execution import pick_checkpointing, recompute
from lcmlora.training.loop import take_step
from lcmlora.training.optimization import Optimization

_TIMED = 2  # steps, after one that warms up
_CHECKPOINTING = ("none", "selective", "full")  # from the most memory to the least
# Keys of the JSON that differ from the fields, since programs read them.
_JSON_KEYS = {"targets_seconds": "targets", "checkpoint_bytes": "checkpoint", "free_bytes": "free"}
_BUFFERS = 5  # of the adapter's size in a checkpoint: weights, average, two moments, the best weights


@dataclass(frozen=True)
class Trial:
    """Settings that divide a step or save memory, and the measured step: neither figure if memory ran out."""

    accumulate: int
    checkpointing: str
    seconds: float | None = None
    peak: int | None = None  # bytes


@dataclass(frozen=True)
class Estimate:
    """What a distillation at these settings will take. Sizes in bytes, times in seconds, for one process."""

    device: str
    memory: int | None  # of the GPU
    precision: str
    patches: list[str]  # of the network in a training step
    pictures: int
    captions: int
    validation_pictures: int
    epochs: float
    trials: list[Trial]  # the chosen settings first
    best: Trial
    images_per_second: float  # over all processes
    targets_seconds: float  # computing the validation targets, once
    validation: float  # each validation
    total: float
    checkpoint_bytes: int
    free_bytes: int  # on the disk of the scratch folder
    random_latents: bool = False  # there was no latent cache: pictures and captions are not those of the run

    def to_json(self) -> str:
        """Returns the estimate as JSON; the keys are those of `lcmlora doctor --json`."""
        return json.dumps({_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}, indent=2)


@dataclass(frozen=True)
class _ValidationTime:
    targets: float  # seconds, once
    each: float  # seconds


def estimate_run(base: LoadedBase, cache: LatentCache, settings: Distill, launch: Launch, scratch: Path) -> Estimate:
    """Returns what a distillation at these settings will take on this device.

    Args:
        base: with its network and VAE, without an adapter; afterwards it has one.
        scratch: the folder that checkpoints will be written to.

    Raises:
        UserError: too few pictures, too little disk, or too little memory; in the last case it names settings that fit.
    """
    rows, validation_rows = split_rows(cache, settings)
    if len(rows) < settings.batch or not len(validation_rows):
        raise UserError(
            f"distill.batch: {settings.batch} is more than the {len(rows)} pictures to train on, or the "
            f"{len(validation_rows)} to validate with are none"
        )
    # One process's share of a step, on this process alone.
    share = settings.model_copy(
        update={
            "batch": settings.batch // (launch.processes * launch.machines),
            "checkpointing": pick_checkpointing(settings.checkpointing, base.device),
        }
    )
    optimization = add_adapter(base, share)
    patches = [str(patch) for patch in installed(base.network)]
    distillation = Distillation(base, cache.unconditional(), share)
    trials = _trials(distillation, optimization, cache, rows, share)
    seconds = trials[0].seconds or 0.0
    validating = _time_validation(distillation, cache, validation_rows, share)
    validations = -(-settings.steps // settings.validate_every)
    device = base.device
    return Estimate(
        device=_device_name(device),
        memory=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        precision=str(base.dtype).removeprefix("torch."),
        patches=patches,
        pictures=len(rows),
        captions=int(cache.captions().max()) + 1,
        validation_pictures=len(validation_rows),
        epochs=settings.steps * settings.batch / len(rows),
        trials=trials,
        best=min((trial for trial in trials if trial.seconds), key=lambda trial: trial.seconds or 0.0),
        images_per_second=settings.batch / seconds,
        targets_seconds=validating.targets,
        validation=validating.each,
        total=settings.steps * seconds + validating.targets + validations * validating.each,
        checkpoint_bytes=_checkpoint_bytes(base, scratch),
        free_bytes=shutil.disk_usage(scratch).free,
    )


def estimate_without_cache(
    name: str, base: Base, folder: Path, settings: Distill, launch: Launch, scratch: Path, work: Path
) -> Estimate:
    """Returns what a distillation will take, measured on random latents. Steps cost the same as on those of pictures.

    Args:
        folder: of the base.
        scratch: as of `estimate_run`.
        work: an empty folder.

    Raises:
        UserError: as of `estimate_run`, or the base cannot be loaded.
    """
    device = bases.pick_device(settings.device)
    dtype = bases.pick_dtype(settings.precision, device)
    loaded = bases.load(name, base, folder, device=device, dtype=dtype)
    # At most a tenth of a cache is kept from training; so many leave a batch, too.
    pictures = max(10 * settings.validation_pictures, 2 * settings.batch)
    cache = random_cache(loaded, pictures, work)
    if not cache.tokenized:
        loaded.text_encoders = []
    cache.embed = loaded.encode_tokens
    # A random cache has no states of teacher rollouts; steps that begin at these take less.
    plain = settings.model_copy(update={"trajectory": 0.0})
    return replace(estimate_run(loaded, cache, plain, launch, scratch), random_latents=True)


def _time_validation(
    distillation: Distillation, cache: LatentCache, rows: Tensor, settings: Distill
) -> _ValidationTime:
    """Returns the seconds of a validation of these rows of the cache, with pictures."""
    base = distillation.base
    recompute(base.network, "none")
    start = _now(base.device)
    validation = Validation(
        distillation, cache, rows, settings, max(1, settings.batch // settings.accumulate), base.decode
    )
    targets_done = _now(base.device)
    validation.loss()
    validation.pictures()
    return _ValidationTime(targets_done - start, _now(base.device) - targets_done)


def _checkpoint_bytes(base: LoadedBase, scratch: Path) -> int:
    """Returns the size of a checkpoint. Raises UserError if the disk has no room for two."""
    size = _BUFFERS * 4 * sum(p.numel() for p in base.network.parameters() if p.requires_grad)
    free = shutil.disk_usage(scratch).free
    if free < 2 * size:
        raise UserError(
            f"{scratch}: a checkpoint takes {size / 1e6:.0f} MB, and the next one is written beside it; "
            f"{free / 1e6:.0f} MB are free"
        )
    return size


def _trials(
    distillation: Distillation, optimization: Optimization, cache: LatentCache, rows: Tensor, settings: Distill
) -> list[Trial]:
    """Returns the trial of the chosen settings, and on a GPU those of others.

    Raises:
        UserError: memory ran out; it names settings that fit, if there are any.
    """
    base, device = distillation.base, distillation.base.device

    def measure(trial: Trial) -> Trial:
        changed = settings.model_copy(update={"accumulate": trial.accumulate, "checkpointing": trial.checkpointing})
        recompute(base.network, trial.checkpointing)
        batches = sample_stream(cache, rows, changed, device)
        _free_memory(device)
        try:
            take_step(distillation, optimization, batches, changed, 0)
            start = _now(device)
            for step in range(1, 1 + _TIMED):
                take_step(distillation, optimization, batches, changed, step)
        except torch.OutOfMemoryError:
            return trial
        return Trial(trial.accumulate, trial.checkpointing, (_now(device) - start) / _TIMED, _peak(device))

    chosen = measure(Trial(settings.accumulate, settings.checkpointing))
    trials = [chosen]
    if device.type == "cuda" or not chosen.seconds:
        for other in _others(settings, fits=bool(chosen.seconds)):
            trials.append(measure(other))
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
    """Yields other settings for a step, the fastest first: with more memory if the chosen ones fit, else with less."""
    divisors = [a for a in range(1, settings.batch + 1) if settings.batch % a == 0]
    chosen = (settings.accumulate, _CHECKPOINTING.index(settings.checkpointing))
    for accumulate in divisors:
        for level, checkpointing in enumerate(_CHECKPOINTING):
            if (accumulate, level) == chosen:
                continue
            needs_more = accumulate <= chosen[0] and level <= chosen[1]
            needs_less = accumulate >= chosen[0] and level >= chosen[1]
            if needs_more if fits else needs_less:
                yield Trial(accumulate, checkpointing)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Returns the most bytes that were in use: on a GPU since `_free_memory`, on a CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now(device: torch.device) -> float:
    """Returns the time in seconds when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def print_estimate(estimate: Estimate, settings: Distill, name: str) -> None:
    """Prints the estimate as a table."""
    from rich.console import Console
    from rich.table import Table

    e, chosen = estimate, estimate.trials[0]
    table = Table(show_header=False, title=f"distill {name}")
    memory = f", {e.memory / 1e9:.0f} GB" if e.memory else ""
    table.add_row("device", f"{e.device}{memory}, {e.precision}")
    data = (
        f"{e.pictures} pictures to train on, {e.epochs:.1f} epochs; {e.validation_pictures} to validate with; "
        f"{e.captions} captions in all"
    )
    table.add_row("data", "random latents, since there is no cache yet" if e.random_latents else data)
    for number, patch in enumerate(e.patches):
        table.add_row("" if number else "patches", patch)
    for trial in e.trials:
        label = "a step as chosen" if trial is chosen else "a step with"
        result = "too little memory"
        if trial.seconds and trial.peak:
            result = f"{trial.seconds:.3g} s, peak {trial.peak / 1e9:.2f} GB"
        table.add_row(label, f"accumulate {trial.accumulate}, checkpointing {trial.checkpointing}: {result}")
    table.add_row("speed", f"{e.images_per_second:.3g} images/s")
    table.add_row("validation", f"{e.targets_seconds:.1f} s for the targets, {e.validation:.1f} s each time")
    table.add_row("in all", f"{e.total / 3600:.2f} h for {settings.steps} steps")
    table.add_row("checkpoint", f"{e.checkpoint_bytes / 1e6:.0f} MB every {settings.checkpoint_every} steps; "
                                f"{e.free_bytes / 1e9:.0f} GB free")  # fmt: skip
    if e.best is not chosen and chosen.seconds and e.best.seconds and e.best.seconds < 0.95 * chosen.seconds:
        table.add_row(
            "faster",
            f"distill.accumulate: {e.best.accumulate}, distill.checkpointing: {e.best.checkpointing} "
            f"({chosen.seconds / e.best.seconds:.2f} times)",
        )
    Console().print(table)
