"""What the student is asked to match, one small class for each method.

All are one family. The student jumps from z_{t_{n+k}} and from the teacher's zhat_{t_n} down to the same timestep s,

    jump(x_t -> s) = alpha_s x0 + sigma_s eps,

and the first is to be where the second is. Methods differ in s, in how they jump, and in the sampler that goes with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcmlora.bases.schedule import Prediction, Schedule
from lcmlora.config import Distill
from lcmlora.diffusion import solver

_TDD_STEPS = range(4, 9)  # the schedules whose timesteps are TDD's targets
_TDD_ETA = 0.3  # how far below them a target may lie, as a share


@dataclass(frozen=True)
class Sampler:
    """How a student is drawn with: diffusers' scheduler and, for TCDScheduler, its gamma, a pipeline's `eta`."""

    scheduler: str
    gamma: float | None = None


class Objective:
    """A method. `index` (B,) int64 is a row of the solver's grid: from `upper[index]` the teacher steps to
    `lower[index]`, and the destination of both jumps is a timestep at or below the latter."""

    sampler: Sampler

    def __init__(self, schedule: Schedule, grid: int) -> None:
        self._schedule = schedule
        self._grid = grid
        _, lower = solver.ddim_grid(len(schedule), grid)
        self.lower = lower.to(schedule.alpha.device)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        """Returns s (B,) int64; u (B, 2) are the samples' own uniform numbers in [0, 1)."""
        raise NotImplementedError

    def reach(self, index: Tensor) -> Tensor:
        """Returns the lowest point of the grid (B,) int64 to which the student learns to jump from `upper[index]`."""
        return torch.zeros_like(index)

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Returns the state (B, C, h, w) fp32 at s to which the student jumps from x at t; x itself where s = t."""
        return self._schedule.state(*prediction, s)

    def travel(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """Returns the state (B, C, h, w) fp32 at s to which the student's sampler goes from x at t: it jumps somewhat
        below and takes up noise (arXiv 2402.19159, Algorithm 4).

        Args:
            noise: (B, C, h, w) of unit variance.
        """
        below = ((1 - (self.sampler.gamma or 0.0)) * s).long()
        return self._schedule.renoise(self.jump(x, prediction, t, below), noise, below, s)

    def _edges(self, steps: int) -> Tensor:
        """Returns, for each row of the grid, where a student of this many steps would go from it, (grid,) int64."""
        timesteps = solver.student_timesteps(len(self._schedule), self._grid, steps)
        edges = torch.tensor([0, *reversed(timesteps[1:])], device=self.lower.device)
        return edges[torch.bucketize(self.lower, edges, right=True) - 1]


class LatentConsistency(Objective):
    """Latent consistency distillation, arXiv 2310.04378, Algorithm 1: straight to t = 0, with c_skip and c_out."""

    sampler = Sampler("LCMScheduler")

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        del u
        return torch.zeros_like(index)

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        del s
        return solver.consistency(x, prediction.x0, t)

    def travel(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """To t = 0, and with noise back to s (arXiv 2310.04378, Algorithm 3)."""
        return self._schedule.state(self.jump(x, prediction, t, s), noise, s)


class TrajectoryConsistency(Objective):
    """Trajectory consistency distillation, arXiv 2402.19159: to any point of the grid from t_n down to 0."""

    def __init__(self, schedule: Schedule, grid: int, gamma: float) -> None:
        super().__init__(schedule, grid)
        self.sampler = Sampler("TCDScheduler", gamma)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        return self.lower[(u[:, 0] * (index + 1)).long().clamp(max=index)]


class PhasedConsistency(Objective):
    """Phased consistency, arXiv 2405.18407: to the lower edge of the phase, so that a few jumps make the whole way.

    The edges are the timesteps of a student of `phases` steps, which makes those steps the ones that were trained. It
    is drawn with deterministically.
    """

    sampler = Sampler("TCDScheduler", 0.0)

    def __init__(self, schedule: Schedule, grid: int, phases: int) -> None:
        super().__init__(schedule, grid)
        self._edge = self._edges(phases)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        del u
        return self._edge[index]

    def reach(self, index: Tensor) -> Tensor:
        return self._edge[index]


class TargetDriven(Objective):
    """Target-driven distillation, arXiv 2409.01347: to where a student of 4 to 8 steps would go, or somewhat lower."""

    def __init__(self, schedule: Schedule, grid: int, gamma: float) -> None:
        super().__init__(schedule, grid)
        self.sampler = Sampler("TCDScheduler", gamma)
        self._edge = torch.stack([self._edges(steps) for steps in _TDD_STEPS])

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        edge = self._edge[(u[:, 0] * len(self._edge)).long(), index]
        return ((1 - _TDD_ETA * u[:, 1]) * edge).long()

    def reach(self, index: Tensor) -> Tensor:
        return self._edge[0, index]


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Returns mean(sqrt((a - b)^2 + c^2) - c) of each sample, (B,) fp32."""
    return ((a - b).square().add(c * c).sqrt() - c).flatten(1).mean(1)


def make(settings: Distill, schedule: Schedule) -> Objective:
    """Returns the objective that the settings name, for a base of this schedule."""
    if settings.objective == "lcm":
        return LatentConsistency(schedule, settings.grid)
    if settings.objective == "pcm":
        return PhasedConsistency(schedule, settings.grid, settings.phases)
    if settings.objective == "tcd":
        return TrajectoryConsistency(schedule, settings.grid, settings.gamma)
    return TargetDriven(schedule, settings.grid, settings.gamma)
