"""Drawing that starts from a picture: all of it drawn anew from some noise on (img2img), or a part of it (inpainting).

A strength is a share of the student's timesteps: drawing starts at the noisiest one that it leaves. The student takes
as many steps as it is asked for, all of them from there down. diffusers' pipelines instead drop steps: 4 steps at
strength 0.2 are none there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.schedule import Schedule
from lcmlora.diffusion import solver
from lcmlora.errors import UserError


@dataclass(frozen=True, eq=False)
class SourceLatents:
    """The picture that drawing starts from, as latents.

    latents: (B, C, h, w) or (1, C, h, w) fp32, diffusion-ready.
    strength: in (0, 1].
    mask: (1, 1, h, w), 1 where the picture is drawn anew and 0 where it is kept; None draws all of it anew.
    """

    latents: Tensor
    strength: float
    mask: Tensor | None = None

    def noisy(self, noise: Tensor, schedule: Schedule, t: int, *, most: bool) -> Tensor:
        """Returns the state (B, C, h, w) at t that drawing starts from.

        Args:
            noise: (B, C, h, w) of unit variance.
            most: t is the noisiest timestep of all. A part that is drawn anew then starts from noise alone, as in
                diffusers' pipelines.
        """
        return noise if most and self.mask is not None else self._at(t, noise, schedule)

    def keep(self, x: Tensor, noise: Tensor, schedule: Schedule, t: int | None) -> Tensor:
        """Returns the state x at t with the picture, as noisy, wherever it is kept; t None is the end of drawing."""
        if self.mask is None:
            return x
        kept = self.latents if t is None else self._at(t, noise, schedule)
        return (1 - self.mask) * kept + self.mask * x

    def _at(self, t: int, noise: Tensor, schedule: Schedule) -> Tensor:
        return schedule.state(self.latents, noise, torch.tensor([t], device=noise.device))


def check_steps(sampler: Sampler, steps: int, strength: float | None = None, *, option: str = "") -> None:
    """Checks that the student can take this number of steps, each of them a network evaluation.

    Args:
        strength: None where drawing starts from noise alone.
        option: what stands before the names `steps` and `strength` in messages, such as `--`.

    Raises:
        UserError: the strength is out of its range or leaves none of the adapter's timesteps, or there are fewer
            timesteps than steps.
    """
    known, where = sampler.grid, ""
    if strength is not None:
        if not 0 < strength <= 1:
            raise UserError(f"{option}strength: expected more than 0 and at most 1, got {strength:g}")
        known, where = solver.timesteps_at(sampler.grid, strength), f" at strength {strength:g}"
        if not known:
            raise UserError(
                f"{option}strength: {strength:g} is below all {sampler.grid} timesteps of this adapter, which leaves "
                f"nothing to draw; expected {1 / sampler.grid:g} or more"
            )
    if not 1 <= steps <= known:
        raise UserError(f"{option}steps: expected 1 to {known}, the timesteps of this adapter{where}, got {steps}")
