"""The loss of a distillation: one frozen base with an adapter is teacher, student and target.

It is the teacher with the adapter off, the student with the adapter on, and the target with the adapter on and without
gradients. A step costs four forwards and one backward of the network: the teacher's conditional and unconditional
forward, which are one batch, the target's, and the student's. A step that begins at two neighbouring states of a
teacher rollout (`data.source: prompts`) needs only the last two.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.bases.schedule import Prediction
from lcmlora.config import Distill
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion import objectives, solver
from lcmlora.diffusion.objectives import Objective, pseudo_huber
from lcmlora.diffusion.teacher import Teacher
from lcmlora.diffusion.teacher_cache import TeacherCache
from lcmlora.parallel.ranks import Ranks
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training.batches import Batch, Batches
from lcmlora.training.execution import compile_network, recompute
from lcmlora.training.loop import Trainable
from lcmlora.training.optimization import Optimization


def sample_stream(
    cache: LatentCache, rows: Tensor, settings: Distill, device: torch.device, ranks: Ranks | None = None
) -> Batches:
    """Returns the stream of samples of a distillation on these rows (N,) of the cache."""
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


class Distillation(Trainable):
    """The loss of a base with an adapter under a distillation objective."""

    def __init__(
        self,
        base: LoadedBase,
        unconditional: Conditioning,
        settings: Distill,
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        self.base = base
        self.teacher = Teacher(base, unconditional, settings.grid, teacher_cache)
        # (grid,) of each row of the solver timesteps
        self.weight = solver.loss_weights(base.schedule, self.teacher.t, settings.weighting)
        self.objective: Objective = objectives.make(settings, base.schedule)
        self._huber_c = settings.huber_c
        self._averaged_target = settings.target == "ema"

    def noisy(self, batch: Batch, index: Tensor) -> Tensor:
        """Returns z_{t_{n+k}} (B, C, h, w) at these rows (B,) of the solver timesteps."""
        return self.base.schedule.state(batch.z, batch.noise, self.teacher.t[index])

    def student(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Returns the prediction of the base with its adapter for x (B, C, h, w) at t (B,)."""
        return self.base.schedule.prediction(self.base.predict(x, t, conditioning), x, t)

    @torch.no_grad()
    def _student_rollout(self, batch: Batch) -> Tensor:
        """Returns the states (B, C, h, w) that the student as it is reaches from pure noise through `batch.stops`."""
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
            optimization: has the averaged weights, which the target needs with `distill.target: ema`.
        """
        t, t_prev = self.teacher.t[batch.index], self.teacher.t_prev[batch.index]
        if batch.pair is not None:
            x, x_prev = batch.pair
        elif batch.stops is not None:
            x = self._student_rollout(batch)
            x_prev = self.teacher.step(x, t, t_prev, batch.w, batch.conditioning)
        else:
            x = self.noisy(batch, batch.index)
            x_prev = self.teacher.step(x, t, t_prev, batch.w, batch.conditioning, batch.sample_indices)
        s = self.objective.destination(batch.index, batch.u)
        # The target comes first: the averaged weights must not replace those that the student's forward keeps for its
        # backward pass.
        averaged = optimization.averaged() if optimization and self._averaged_target else contextlib.nullcontext()
        with torch.no_grad(), averaged:
            target = self.objective.jump(x_prev, self.student(x_prev, t_prev, batch.conditioning), t_prev, s)
        online = self.objective.jump(x, self.student(x, t, batch.conditioning), t, s)
        return self.weight[batch.index] * pseudo_huber(online, target, self._huber_c)


def add_adapter(
    base: LoadedBase, settings: Distill, ranks: Ranks | None = None, start: Path | None = None
) -> Optimization:
    """Gives a base without adapter a new one, executed as the settings say, and returns the adapter's optimization.

    Args:
        start: the file of an adapter whose values it begins with.

    Raises:
        UserError: that adapter has other layers, or another rank.
    """
    placement = base.family.placement
    layers = None if start is None else lora.read(base.network, start, placement)
    parameters = lora.inject(base.network, settings.rank, settings.alpha, settings.seed, placement)
    if layers is not None:
        lora.fill(base.network, layers, str(start))
    LoraForwards().install(base.network)
    recompute(base.network, settings.checkpointing)
    if settings.compile:
        compile_network(base.network)
    return Optimization(parameters, settings, ranks=ranks, scaled=base.dtype == torch.float16)
