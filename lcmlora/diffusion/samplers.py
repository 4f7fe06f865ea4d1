"""One step of each sampler of a student. Training on its own states, validation and all drawing take this step.

A sampler is a class, named by the scheduler of diffusers that does the same (lcmlora/plugins.py says how one is added):
releases keep that name, and plain diffusers draws with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.schedule import Prediction, Schedule
from lcmlora.diffusion import solver
from lcmlora.plugins import SAMPLERS


class StudentSampler(ABC):
    """How a student with these settings goes from timestep to timestep. States are (B, C, h, w) fp32, t and s (B,).

    adds_noise: whether a step ends with new noise.
    """

    adds_noise: bool = True

    def __init__(self, settings: Sampler, schedule: Schedule) -> None:
        self.settings = settings
        self.schedule = schedule

    @abstractmethod
    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Returns the state at s to which the student jumps from x at t; x itself where s = t."""

    @abstractmethod
    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """Returns the state at s to which it goes from x at t: it jumps to s or below, and adds noise up to s.

        Args:
            noise: (B, C, h, w) of unit variance.
        """


class MultistepConsistency(StudentSampler):
    """Multistep consistency sampling (arXiv 2310.04378, Algorithm 3): to t = 0, and with noise back to s."""

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """Straight to t = 0 whatever s is, with the boundary condition of c_skip and c_out."""
        del s
        return solver.consistency(x, prediction.x0, t)

    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        return self.schedule.state(self.jump(x, prediction, t, s), noise, s)


class StrategicStochastic(StudentSampler):
    """Strategic stochastic sampling (arXiv 2402.19159, Algorithm 4): to floor((1 - gamma) s), with noise up to s."""

    def __init__(self, settings: Sampler, schedule: Schedule) -> None:
        super().__init__(settings, schedule)
        self.adds_noise = bool(settings.gamma)

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        """A DDIM step."""
        return self.schedule.state(*prediction, s)

    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        below = ((1 - (self.settings.gamma or 0.0)) * s).long()  # in fp32, as diffusers multiplies
        return self.schedule.renoise(self.jump(x, prediction, t, below), noise, below, s)


def make(settings: Sampler, schedule: Schedule) -> StudentSampler:
    """Returns the sampler of these settings. Raises UserError where there is none for their scheduler."""
    found: StudentSampler = SAMPLERS.get(settings.scheduler)(settings, schedule)
    return found


def scheduler_config(base_config: dict[str, Any], settings: Sampler) -> dict[str, Any]:
    """Returns the configuration of diffusers' scheduler that draws so, for a base whose scheduler has `base_config`."""
    import diffusers

    scheduler = getattr(diffusers, settings.scheduler).from_config(base_config, original_inference_steps=settings.grid)
    return dict(scheduler.config) | {"_class_name": settings.scheduler}
