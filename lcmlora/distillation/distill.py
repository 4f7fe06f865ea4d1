"""Distillation of a LoRA: the teacher, what is asked of the student, and what is kept of a run.

One frozen base serves as teacher (adapter off), student (adapter on, with gradients) and target (adapter on, without).
A step costs four UNet forwards and one backward: the teacher's conditional and unconditional passes in one batch, the
target, and the student; where it starts from a neighbouring pair of states that the teacher's own run left in the
cache, the last two. It reads the latent cache only: there is a text encoder in memory only for a cache of token ids,
behind its `embed`, and a VAE only where pictures are asked for, behind the `decode` that is passed in.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcmlora import stages
from lcmlora.adapters import lora
from lcmlora.adapters.facts import Sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.bases.schedule import Prediction
from lcmlora.config import Distill, check_trajectory, digest
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion import objectives, samplers, solver
from lcmlora.diffusion.objectives import Objective, pseudo_huber
from lcmlora.diffusion.teacher import Teacher
from lcmlora.diffusion.teacher_cache import TeacherCache
from lcmlora.distillation.validation import Validation
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, write_json
from lcmlora.parallel.ranks import Ranks
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training.batches import Batch, Batches, split
from lcmlora.training.execution import AdapterCheck, compiled, eager, recompute
from lcmlora.training.loop import Logger, train
from lcmlora.training.optimization import Optimization


def samples(
    cache: LatentCache, rows: Tensor, settings: Distill, device: torch.device, ranks: Ranks | None = None
) -> Batches:
    """Returns the stream of samples that a distillation sees of these rows (N,) of the cache."""
    guidance = (settings.w_min, settings.w_max)
    return Batches(
        cache,
        rows,
        settings,
        device,
        ranks,
        grid=settings.grid,
        guidance=guidance,
        trajectory=settings.trajectory,
        rollout=settings.rollout,
    )


class Distillation:
    """One frozen base in its roles, and what is asked of the student."""

    def __init__(
        self,
        base: LoadedBase,
        unconditional: Conditioning,
        settings: Distill,
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        self.base = base
        self.teacher = Teacher(base, unconditional, settings.grid, teacher_cache)
        self.weight = solver.loss_weights(base.schedule, self.teacher.t, settings.weighting)  # of each row
        self.objective: Objective = objectives.make(settings, base.schedule)
        self._huber_c = settings.huber_c
        self._averaged_target = settings.target == "ema"

    def noisy(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns z_{t_{n+k}} (B, C, h, w) at these rows of the grid (B,)."""
        return self.base.schedule.state(batch.z, batch.noise, self.teacher.t[index])

    def student(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Returns what the base with its adapter says of x (B, C, h, w) at t (B,)."""
        return self.base.schedule.prediction(self.base.predict(x, t, conditioning), x, t)

    @torch.no_grad()
    def _travelled(self, batch: Batch) -> Tensor:
        """Returns the states (B, C, h, w) to which the student as it is comes from pure noise, by way of the stops."""
        assert batch.stops is not None and batch.fresh is not None
        x, row = batch.noise, torch.full_like(batch.index, len(self.teacher.t) - 1)
        for stop, fresh in zip(batch.stops, batch.fresh, strict=True):
            t, s = self.teacher.t[row], self.teacher.t[stop]
            arrived = self.objective.step(x, self.student(x, t, batch.conditioning), t, s, fresh)
            stays = (stop == row).view(-1, *(1,) * (x.ndim - 1))
            x, row = torch.where(stays, x, arrived), stop
        return x

    def losses(self, batch: Batch, optimization: Optimization | None = None) -> Tensor:
        """Returns the weighted loss of each sample, (B,), with gradients to the adapter alone.

        Args:
            optimization: has the averaged weights, where the target is computed with those.
        """
        t, t_prev = self.teacher.t[batch.index], self.teacher.t_prev[batch.index]
        if batch.pair is not None:
            x, x_prev = batch.pair
        elif batch.stops is not None:
            x = self._travelled(batch)
            x_prev = self.teacher.step(x, t, t_prev, batch.w, batch.conditioning)
        else:
            x = self.noisy(batch, batch.index)
            x_prev = self.teacher.step(x, t, t_prev, batch.w, batch.conditioning, batch.places)
        s = self.objective.destination(batch.index, batch.u)
        # The target first: what the student's forward keeps for the backward pass must not change any more.
        averaged = optimization.averaged() if optimization and self._averaged_target else contextlib.nullcontext()
        with torch.no_grad(), averaged:
            aim = self.objective.jump(x_prev, self.student(x_prev, t_prev, batch.conditioning), t_prev, s)
        online = self.objective.jump(x, self.student(x, t, batch.conditioning), t, s)
        return self.weight[batch.index] * pseudo_huber(online, aim, self._huber_c)


def distill(
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    scratch: Path,
    out: Path,
    *,
    identity: dict[str, Any],
    logger: Logger,
    ranks: Ranks | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    teacher_cache: tuple[Path, int] | None = None,
) -> dict[str, Any]:
    """Trains the adapter and writes the folder `out`; returns its config.json.

    Of many processes all call this with the same arguments; the first one writes, validates and logs.

    Args:
        base: with its UNet loaded, bare; it carries the adapter, active, when this returns.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        identity: what config.json says of the base.
        decode: latents to pictures in [0, 1], for the validation pictures; without it there are none.
        teacher_cache: a folder, the same for many runs, and the bytes that it may hold of what the teacher says of
            the samples of this one.

    Raises:
        UserError: the cache was made for other latents or holds less than a batch, the loss is not finite ten times in
            a row, the adapter does not do what it should, or the processes have different files.
    """
    ranks = ranks or Ranks()
    rows, held = _rows(base, cache, settings)
    if teacher_cache and len(cache.buckets) > 1:
        raise UserError("teacher_cache_gb: keeps what is said of one shape, and the pictures have several; set it to 0")
    batches = samples(cache, rows, settings, base.device, ranks)
    probe = _probe(base, batches.at(range(-2, 0), rows[:1].expand(2)))
    check = AdapterCheck(base, *probe)
    optimization = equip(base, settings, ranks)
    remembered = teacher_cache and _teacher_cache(*teacher_cache, base, cache, settings, batches, identity)
    distillation = Distillation(base, cache.unconditional(), settings, remembered or None)

    if settings.compile:
        check.compiled(batches.size, 2 * batches.size)
    else:
        check.teacher()
    state = train(
        "distill",
        distillation,
        optimization,
        batches,
        lambda: Validation(distillation, cache, held, settings, batches.size, decode),
        settings,
        scratch,
        check=check.student,
        agree={"base": identity, "latent_cache": cache.digest},
        logger=logger,
        ranks=ranks,
    )
    facts = {
        "model": base.name,
        "base": identity,
        "prediction_type": base.schedule.prediction_type,
        "data_digest": cache.digest,
        "pictures": len(rows),
        "distill": settings.model_dump(mode="json"),
        "steps": settings.steps,
        "final_loss": state["loss"],
        "sampler": asdict(distillation.objective.sampler),
        "seed": settings.seed,
        "adapted_layers": lora.adapted_layers(base.network),
        "lora_parameters": lora.parameters(base.network),
        # Not Python's, nor torch's build (`+cpu`): the machine's, and the adapter is the same with others.
        "versions": {name: number.partition("+")[0] for name, number in versions().items() if name != "python"},
    }
    if ranks.first:
        best = state["best"]
        facts["validation"] = {"pictures": len(held), "loss": state["history"], "best_step": best["step"]}
        optimization.use(best["weights"], _file_dtype(base))
        _write(base, settings, out, facts, probe)
    ranks.wait()
    return facts


def _rows(base: LoadedBase, cache: LatentCache, settings: Distill) -> tuple[Tensor, Tensor]:
    """Returns the rows of the cache to train on and those to validate with, once it is what this base needs."""
    check_trajectory(settings, cache.rollouts)
    if cache.latent_shape != base.latent_shape:
        raise UserError(
            f"the latent cache holds {cache.latent_shape}, {base.name} needs {base.latent_shape}: encode again"
        )
    rows, held = split(cache, settings)
    if len(rows) < settings.batch or not len(held):
        raise UserError(
            f"distill.batch: {settings.batch} is more than the {len(rows)} pictures of the cache that are left beside "
            f"{len(held)} for validation"
        )
    return rows, held


def _write(base: LoadedBase, settings: Distill, out: Path, facts: dict[str, Any], probe: Probe) -> None:
    """Writes the adapter that the base carries, how to sample with it, and what is known of it."""
    with atomic_folder(out) as folder:
        placement = base.family.placement
        tensors, metadata = lora.state_dict(base.network, placement), lora.adapter_metadata(settings.rank, placement)
        lora.save_file(tensors, folder / lora.WEIGHTS, dtype=_file_dtype(base), metadata=metadata)
        scheduler = samplers.scheduler_config(base.scheduler_config, Sampler(**facts["sampler"]))
        write_json(folder / "scheduler_config.json", scheduler)
        write_json(folder / "config.json", facts)
        _save_probe(base, probe, folder / "probe.safetensors")


def _teacher_cache(
    folder: Path,
    limit: int,
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    batches: Batches,
    identity: dict[str, Any],
) -> TeacherCache:
    """Returns the cache of all runs to which the teacher says the same, to the bit, of the same samples."""
    decisive = ("seed", "batch", "grid", "empty_prompts", "validation_pictures", "compile")
    key = digest(
        settings.model_dump(include=set(decisive)),
        identity,
        cache.digest,
        # What else decides how a pass is rounded.
        {"dtype": str(base.dtype), "device": base.device.type, "rows": batches.size} | versions(),
        stages.algorithms("distill"),
    )
    places = settings.steps * settings.batch
    return TeacherCache(folder / f"{base.name}-{key[:12]}", base.latent_shape, base.dtype, places, limit)


def _file_dtype(base: LoadedBase) -> torch.dtype:
    """Weights of a half-precision base are released in fp16, as the published adapters are."""
    return torch.float32 if base.dtype == torch.float32 else torch.float16


def equip(base: LoadedBase, settings: Distill, ranks: Ranks | None = None) -> Optimization:
    """Gives a bare base its adapter, executed as the settings say, and returns the adapter's optimization."""
    parameters = lora.inject(base.network, settings.rank, settings.alpha, settings.seed, base.family.placement)
    LoraForwards().install(base.network)
    recompute(base.network, settings.checkpointing)
    if settings.compile:
        compiled(base.network)
    return Optimization(parameters, settings, ranks=ranks, scaled=base.dtype == torch.float16)


def versions() -> dict[str, str]:
    """Returns the versions that may decide how a run is rounded, down to the build: `2.13.0+cpu`."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "peft")}


Probe = tuple[Tensor, Tensor, Conditioning]


def _probe(base: LoadedBase, batch: Batch) -> Probe:
    """Returns latents, timesteps and conditioning of one fixed forward."""
    timesteps = len(base.schedule)
    t = torch.tensor([timesteps - 1, timesteps // 2], device=base.device)
    return batch.noise, t, {name: value.contiguous() for name, value in batch.conditioning.items()}


@torch.no_grad()
def _save_probe(base: LoadedBase, probe: Probe, path: Path) -> None:
    """Writes one forward of the live student and of the base alone, for whoever reloads the file to compare with."""
    latents, timesteps, conditioning = probe
    with eager():
        student = base.predict(*probe)
        with lora.disabled(base.network):
            alone = base.predict(*probe)
    tensors = {"latents": latents, "timesteps": timesteps, "student": student, "base": alone} | conditioning
    from safetensors.torch import save_file

    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path)
