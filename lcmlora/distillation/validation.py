"""Validation during a distillation: the student's jumps against the teacher's solver, on pictures kept from training.

The training loss compares the student with itself: it is zero for a student whose output is the same everywhere. The
targets here are fixed. At the start of a run the teacher solves from fixed noisy states, at the timesteps of a student
of a few steps, down to the timestep that the student jumps to. The validation loss is the distance of the student's
jumps from these targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcmlora.config import Distill
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion import sampling, solver
from lcmlora.diffusion.objectives import Objective, pseudo_huber
from lcmlora.errors import UserError
from lcmlora.progress import track
from lcmlora.training.batches import Batch, Batches, chunks

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcmlora.distillation.loss import Distillation
    from lcmlora.training.loop import Logger

STEPS = 4  # of the student whose timesteps are validated and which draws the pictures
_PICTURES = 8  # that are drawn


@dataclass(frozen=True)
class _Jump:
    batch: Batch
    index: Tensor  # (B,) int64, row of the solver timesteps where it starts, the same for all
    x: Tensor  # (B, C, h, w) state where it starts
    s: Tensor  # (B,) int64, timestep where it ends
    target: Tensor  # (B, C, h, w) state of the teacher's solver at s


class Validation:
    """Fixed noisy states and their targets, computed when this is made."""

    def __init__(
        self,
        distillation: Distillation,
        cache: LatentCache,
        rows: Tensor,
        settings: Distill,
        size: int,
        decode: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Args:
        rows: (N,) int64, of the pictures kept from training.
        size: pictures in one forward.
        decode: latents (B, C, h, w) to pictures (B, 3, H, W) in [0, 1]; without it no pictures are drawn.
        """
        self._distillation = distillation
        self._settings = settings = settings.model_copy(update={"empty_prompts": 0.0})
        guidance = (settings.w_min, settings.w_max)
        device = distillation.base.device
        batches = Batches(cache, rows, settings, device, grid=settings.grid, guidance=guidance)
        self._decode = decode
        base, objective = distillation.base, distillation.objective
        upper, _ = solver.ddim_grid(len(base.schedule), settings.grid)
        starts = solver.student_timesteps(len(base.schedule), settings.grid, min(STEPS, settings.grid))
        parts = chunks(cache, rows, size)
        groups = [(int((upper == t).nonzero()), part) for t in starts for part in parts]
        self._jumps = [
            self._jump(batches, index, part, objective) for index, part in track(groups, "validation targets")
        ]

    @torch.no_grad()
    def _jump(self, batches: Batches, row: int, rows: Tensor, objective: Objective) -> _Jump:
        """Returns the jumps of these rows of the cache from one row of the solver timesteps."""
        d = self._distillation
        # Negative sample indices: no training sample has their random numbers.
        batch = batches.at(range(-1 - int(rows[0]) - len(rows), -1 - int(rows[0])), rows)
        index = torch.full_like(batch.index, row)
        s = objective.reach(index)
        x = start = d.noisy(batch, index)
        w = torch.full_like(batch.w, (self._settings.w_min + self._settings.w_max) / 2)
        for step in range(row, -1, -1):
            if d.teacher.t_prev[step] < s[0]:
                break
            t, t_prev = (v[step].expand(len(rows)) for v in (d.teacher.t, d.teacher.t_prev))
            x = d.teacher.step(x, t, t_prev, w, batch.conditioning)
        return _Jump(batch, index, start, s, x)

    def validate(self, step: int, logger: Logger) -> float:
        """Logs loss and pictures of the student as it is at this step and returns the loss. Raises as `loss` does."""
        loss, pictures = self.loss(), self.pictures()
        logger.log({"validation_loss": loss}, step)
        if pictures:
            logger.picture("validation", pictures, step)
        return loss

    @torch.no_grad()
    def loss(self) -> float:
        """Returns the mean pseudo-Huber distance of the student's jumps from their targets.

        Raises:
            UserError: it is not finite.
        """
        d = self._distillation
        losses = []
        for jump in self._jumps:
            t = d.teacher.t[jump.index]
            end = d.objective.jump(jump.x, d.student(jump.x, t, jump.batch.conditioning), t, jump.s)
            losses.append(pseudo_huber(end, jump.target, self._settings.huber_c))
        loss = torch.cat(losses).mean().item()
        if not loss == loss or loss == float("inf"):
            raise UserError("the validation loss is not finite; lower distill.lr or raise distill.precision")
        return loss

    @torch.no_grad()
    def pictures(self) -> Image | None:
        """Returns a row of pictures that the student draws, of the same captions and noise each time."""
        if self._decode is None:
            return None
        import numpy as np
        from PIL import Image

        d, settings = self._distillation, self._settings
        batch = self._jumps[0].batch
        count = min(_PICTURES, len(batch.z))
        conditioning = {name: value[:count] for name, value in batch.conditioning.items()}
        latents = sampling.sample_student(
            d.base,
            conditioning,
            sampling.initial_noise(batch.z.shape[1:], settings.seed, range(count)),
            steps=min(STEPS, settings.grid),
            seed=settings.seed,
            indices=range(count),
            sampler=d.objective.sampler,
        )
        # One by one: at full resolution the decoder needs more memory for a batch than a training step does.
        row = torch.cat([self._decode(one)[0] for one in latents.split(1)], dim=2)
        if not row.isfinite().all():
            raise UserError("the validation pictures are not finite; is the base's VAE whole?")
        return Image.fromarray(np.asarray(row.mul(255).round().byte().permute(1, 2, 0).cpu()))
