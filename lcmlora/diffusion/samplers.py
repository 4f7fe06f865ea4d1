"""The student's samplers: one step of each. Student rollouts, validation and all drawing take this step.

A sampler is a class. Its name in the table is that of the diffusers scheduler that takes the same step: releases name
that scheduler, and plain diffusers draws with it. lcmlora/plugins.py says how a sampler is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.bases.schedule import Prediction, Schedule
from lcmlora.diffusion import solver
from lcmlora.plugins import SAMPLERS


class StudentSampler(ABC):
    """A student's way from timestep to timestep. States are (B, C, h, w) fp32, timesteps t and s (B,) int64.

    adds_noise: whether a step ends with new noise.
    """

    adds_noise: bool = True

    def __init__(self, settings: Sampler, schedule: Schedule) -> None:
        self.settings = settings
        self.schedule = schedule

    @abstractmethod
    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Returns the state at s to which the student jumps from x at t; x itself if s = t."""

    @abstractmethod
    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """Returns the state at s after a step from x at t: a jump to s or below, and noise up to s.

        Args:
            noise: (B, C, h, w) of unit variance.
        """


class MultistepConsistency(StudentSampler):
    """Multistep consistency sampling (arXiv 2310.04378, Algorithm 3): a jump to t = 0, then noise up to s."""

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Returns the state at t = 0, whatever s is, with the boundary condition of c_skip and c_out."""
        del s
        return solver.consistency(x, prediction.x0, t)

    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        return self.schedule.state(self.jump(x, prediction, t, s), noise, s)


class StrategicStochastic(StudentSampler):
    """Strategic stochastic sampling (arXiv 2402.19159, Algorithm 4): a jump to floor((1 - gamma) s), noise up to s."""

    def __init__(self, settings: Sampler, schedule: Schedule) -> None:
        super().__init__(settings, schedule)
        self.adds_noise = bool(settings.gamma)

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Returns the state at s after a DDIM step."""
        return self.schedule.state(*prediction, s)

    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        below = ((1 - (self.settings.gamma or 0.0)) * s).long()  # in fp32, as diffusers multiplies
        return self.schedule.renoise(self.jump(x, prediction, t, below), noise, below, s)


def make(settings: Sampler, schedule: Schedule) -> StudentSampler:
    """Returns the sampler with these settings. Raises UserError if there is none for their scheduler."""
    sampler: StudentSampler = SAMPLERS.get(settings.scheduler)(settings, schedule)
    return sampler


def scheduler_config(base_config: LibraryConfig, settings: Sampler) -> LibraryConfig:
    """Returns the configuration of the diffusers scheduler that takes this sampler's steps.

    Args:
        base_config: the configuration of the base's own scheduler.
    """
    import diffusers

    scheduler = getattr(diffusers, settings.scheduler).from_config(base_config, original_inference_steps=settings.grid)
    config = LibraryConfig.of_module(scheduler)
    config["_class_name"] = settings.scheduler
    return config
