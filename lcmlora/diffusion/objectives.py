"""Distillation objectives: the state that the student's jump must match, one class for each method.

All methods compare two jumps of the student to the same timestep s, from z_{t_{n+k}} and from the teacher's zhat_{t_n},

    jump(x_t -> s) = alpha_s x0 + sigma_s eps,

and train the first to end where the second ends. They differ in s, and in the student's sampler, which defines the
jump. lcmlora/plugins.py says how an objective is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.schedule import Prediction, Schedule
from lcmlora.config import Distill
from lcmlora.diffusion import samplers, solver
from lcmlora.errors import UserError
from lcmlora.plugins import OBJECTIVES

_TDD_STEPS = range(4, 9)  # TDD's targets are the timesteps of students of these numbers of steps
_TDD_ETA = 0.3  # a target may lie below such a timestep by up to this share


D = TypeVar("D", bound=Distill)  # the settings that an objective reads


class Objective(ABC, Generic[D]):
    """A method of distillation.

    `index` (B,) int64 is a row of the solver timesteps: the teacher steps from `upper[index]` to `lower[index]`, and
    the destination of both jumps is at or below `lower[index]`.

    title: its name in model cards.
    papers: its numbers at arXiv.
    settings_class: of `distill` with this objective. One of another package that has settings of its own names a
        subclass of Distill here, and its keys then stand in `distill` of params.yaml.
    keys: of `distill`, that it reads besides those that all objectives share.
    least_grid: the coarsest grid that it is defined on.
    """

    title: ClassVar[str]
    papers: ClassVar[tuple[str, ...]] = ()
    settings_class: ClassVar[type[Distill]] = Distill
    keys: ClassVar[tuple[str, ...]] = ()
    least_grid: ClassVar[int] = 1

    def __init__(self, settings: D, schedule: Schedule) -> None:
        self.settings = settings
        self.schedule = schedule
        self.sampler = self.sampler_of(settings)
        self._sampling = samplers.make(self.sampler, schedule)
        _, lower = solver.ddim_grid(len(schedule), settings.grid)
        self.lower = lower.to(schedule.alpha.device)

    @classmethod
    @abstractmethod
    def sampler_of(cls, settings: D) -> Sampler:
        """Returns the sampler settings for a student that is trained with these settings."""

    @abstractmethod
    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        """Returns the destination s (B,) int64 of both jumps.

        Args:
            index: (B,) int64.
            u: (B, 2), uniform random numbers of the samples in [0, 1).
        """

    def reach(self, index: Tensor) -> Tensor:
        """Returns the lowest timestep (B,) int64 to which the student learns to jump from `upper[index]`."""
        return torch.zeros_like(index)

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Returns the state (B, C, h, w) fp32 at s to which the student jumps from x at t; x itself if s = t."""
        return self._sampling.jump(x, prediction, t, s)

    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """Returns the state (B, C, h, w) fp32 at s after a step of the student's sampler from x at t.

        Args:
            noise: (B, C, h, w) of unit variance.
        """
        return self._sampling.step(x, prediction, t, s, noise)

    def edges(self, steps: int) -> Tensor:
        """Returns for each row (grid,) int64 the timestep to which a student of this number of steps goes from it."""
        timesteps = solver.student_timesteps(len(self.schedule), self.settings.grid, steps)
        edges = torch.tensor([0, *reversed(timesteps[1:])], device=self.lower.device)
        return edges[torch.bucketize(self.lower, edges, right=True) - 1]


class LatentConsistency(Objective[Distill]):
    """Latent consistency distillation, arXiv 2310.04378, Algorithm 1: jumps to t = 0, with c_skip and c_out."""

    title = "Latent consistency distillation"
    papers = ("2310.04378", "2311.05556")

    @classmethod
    def sampler_of(cls, settings: Distill) -> Sampler:
        return Sampler("LCMScheduler", None, settings.grid)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        del u
        return torch.zeros_like(index)


class TrajectoryConsistency(Objective[Distill]):
    """Trajectory consistency distillation, arXiv 2402.19159: jumps to any solver timestep from t_n down to 0."""

    title = "Trajectory consistency distillation"
    papers = ("2402.19159",)
    keys = ("gamma",)

    @classmethod
    def sampler_of(cls, settings: Distill) -> Sampler:
        return Sampler("TCDScheduler", settings.gamma, settings.grid)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        return self.lower[(u[:, 0] * (index + 1)).long().clamp(max=index)]


class PhasedConsistency(Objective[Distill]):
    """Phased consistency, arXiv 2405.18407: jumps to the lower edge of the phase, so that a few jumps lead to t = 0.

    The edges are the timesteps of a student of `phases` steps; these steps are then the trained ones. The sampler is
    deterministic.
    """

    title = "Phased consistency distillation"
    papers = ("2405.18407",)
    keys = ("phases",)

    def __init__(self, settings: Distill, schedule: Schedule) -> None:
        super().__init__(settings, schedule)
        self._edge = self.edges(settings.phases)

    @classmethod
    def sampler_of(cls, settings: Distill) -> Sampler:
        return Sampler("TCDScheduler", 0.0, settings.grid)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        del u
        return self._edge[index]

    def reach(self, index: Tensor) -> Tensor:
        return self._edge[index]


class TargetDriven(Objective[Distill]):
    """Target-driven distillation, arXiv 2409.01347: jumps to a timestep of a student of 4 to 8 steps, or below it."""

    title = "Target-driven distillation"
    papers = ("2409.01347",)
    keys = ("gamma",)
    least_grid = max(_TDD_STEPS)

    def __init__(self, settings: Distill, schedule: Schedule) -> None:
        super().__init__(settings, schedule)
        self._edge = torch.stack([self.edges(steps) for steps in _TDD_STEPS])

    @classmethod
    def sampler_of(cls, settings: Distill) -> Sampler:
        return Sampler("TCDScheduler", settings.gamma, settings.grid)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        edge = self._edge[(u[:, 0] * len(self._edge)).long(), index]
        return ((1 - _TDD_ETA * u[:, 1]) * edge).long()

    def reach(self, index: Tensor) -> Tensor:
        return self._edge[0, index]


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Returns mean(sqrt((a - b)^2 + c^2) - c) of each sample, (B,) fp32."""
    return ((a - b).square().add(c * c).sqrt() - c).flatten(1).mean(1)


def named(name: str) -> type[Objective]:
    """Returns the class of the objective of this name. Raises UserError if there is none."""
    objective: type[Objective] = OBJECTIVES.get(name)
    return objective


def check(settings: Distill, where: str = "") -> None:
    """Raises UserError if the settings do not fit their objective; `where` is the beginning of the error."""
    objective = named(settings.objective)
    if settings.grid < objective.least_grid:
        raise UserError(
            f"{where}distill.grid: {settings.grid} is too coarse for {settings.objective}, expected at least "
            f"{objective.least_grid}"
        )
    if not isinstance(settings, objective.settings_class):
        raise UserError(
            f"{where}distill.objective: {settings.objective} needs settings of the class "
            f"{objective.settings_class.__name__}, got {type(settings).__name__}"
        )


def make(settings: Distill, schedule: Schedule) -> Objective:
    """Returns the objective that the settings name, for a base of this schedule. Raises as `check` does."""
    check(settings)
    return named(settings.objective)(settings, schedule)


def described(name: str) -> str:
    """Returns title and papers of the objective of this name, for model cards."""
    objective = named(name)
    papers = f" (arXiv {', '.join(objective.papers)})" if objective.papers else ""
    return f"{objective.title}{papers}"
