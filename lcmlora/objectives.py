"""What the student is asked to match. An objective is given the pair of neighbouring states and says the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lcmlora import diffusion
from lcmlora.config import Distill

# A forward of the student: latents (B, C, h, w), timesteps (B,) -> predicted x0 (B, C, h, w), fp32.
Denoise = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """One small class per method; the loop, the teacher and the sampler do not change with it."""

    def __call__(self, student: Denoise, x: Tensor, t: Tensor, x_prev: Tensor, t_prev: Tensor) -> Tensor:
        """Returns the loss of each sample, (B,) fp32, with gradients through the first forward only.

        Args:
            student: a forward of the student with gradients.
            x: (B, C, h, w), the noisier states z_{t_{n+k}}.
            t: (B,) int64, their timesteps.
            x_prev: (B, C, h, w), the teacher's DDIM step of each, zhat_{t_n}.
            t_prev: (B,) int64.
        """
        ...


class LatentConsistency:
    """Latent consistency distillation, arXiv 2310.04378, Algorithm 1, with the stop-gradient target of 2311.05556."""

    def __init__(self, huber_c: float) -> None:
        self._c = huber_c

    def __call__(self, student: Denoise, x: Tensor, t: Tensor, x_prev: Tensor, t_prev: Tensor) -> Tensor:
        online = diffusion.consistency(x, student(x, t), t)
        with torch.no_grad():
            target = diffusion.consistency(x_prev, student(x_prev, t_prev), t_prev)
        return pseudo_huber(online, target, self._c)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Returns mean(sqrt((a - b)^2 + c^2) - c) of each sample, (B,) fp32."""
    return ((a - b).square().add(c * c).sqrt() - c).flatten(1).mean(1)


def make(settings: Distill) -> Objective:
    """Returns the objective that the settings name."""
    return LatentConsistency(settings.huber_c)
