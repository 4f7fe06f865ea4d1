"""The noise schedule of a base: the noise of a latent at each timestep, and the meaning of the network's output.

Notation: x_t = alpha_t x0 + sigma_t eps, in fp32. Tensors of shape (B,) are broadcast over (B, C, h, w) here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """The network's prediction for a noisy state: both (B, C, h, w) fp32."""

    x0: Tensor
    noise: Tensor


class PredictionType(NamedTuple):
    """The meaning of a network's raw output; alpha and sigma are already broadcast over the output."""

    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (output, x, alpha, sigma) -> x0
    noise: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (output, x, alpha, sigma) -> eps
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, eps, alpha, sigma) -> the exact output


# The keys are the names in diffusers' schedulers.
PREDICTION_TYPES = {
    "epsilon": PredictionType(
        x0=lambda output, x, alpha, sigma: (x - sigma * output) / alpha,
        noise=lambda output, x, alpha, sigma: output,
        target=lambda x0, noise, alpha, sigma: noise,
    ),
    # v = alpha eps - sigma x0 (arXiv 2202.00512)
    "v_prediction": PredictionType(
        x0=lambda output, x, alpha, sigma: alpha * x - sigma * output,
        noise=lambda output, x, alpha, sigma: alpha * output + sigma * x,
        target=lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    ),
    "sample": PredictionType(
        x0=lambda output, x, alpha, sigma: output,
        noise=lambda output, x, alpha, sigma: (x - alpha * output) / sigma,
        target=lambda x0, noise, alpha, sigma: x0,
    ),
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """A table of T rows. A timestep t is the number of a row, int64 in [0, T); the noise grows with t.

    alpha, sigma: (T,) fp32.
    time: (T,), the network's time input for each row.
    prediction_type: a key of PREDICTION_TYPES.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {self.prediction_type!r}"
            )
        if not self.alpha.shape == self.sigma.shape == self.time.shape or self.alpha.ndim != 1:
            raise ValueError(
                f"alpha, sigma and time must be (T,), got {tuple(self.alpha.shape)}, {tuple(self.sigma.shape)} and "
                f"{tuple(self.time.shape)}"
            )

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor, prediction_type: str) -> Schedule:
        """Returns the schedule with alpha_t^2 = alphas_cumprod[t], alpha^2 + sigma^2 = 1 and the time input t.

        Args:
            alphas_cumprod: (T,).
            prediction_type: a key of PREDICTION_TYPES.
        """
        cumprod = alphas_cumprod.float()
        time = torch.arange(len(cumprod), device=cumprod.device)
        return cls(cumprod.sqrt(), (1 - cumprod).sqrt(), time, prediction_type)

    def __len__(self) -> int:
        """Returns T."""
        return len(self.alpha)

    def network_time(self, timesteps: Tensor) -> Tensor:
        """Returns what the network is told at these timesteps (B,); between two rows (fp32) it is interpolated."""
        if not timesteps.is_floating_point():
            return self.time[timesteps]
        below = timesteps.floor().long()
        low, high = self.time[below].float(), self.time[(below + 1).clamp(max=len(self) - 1)].float()
        return low + (timesteps - below) * (high - low)

    def to(self, device: torch.device) -> Schedule:
        """Returns the same table on this device."""
        return replace(self, alpha=self.alpha.to(device), sigma=self.sigma.to(device), time=self.time.to(device))

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns alpha_t and sigma_t, both (B,) fp32, for timesteps (B,)."""
        return self.alpha[t], self.sigma[t]

    def state(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x_t (B, C, h, w) = alpha_t x0 + sigma_t noise.

        With x0 and noise predicted at a later timestep it is the deterministic DDIM update (arXiv 2010.02502, eq. 12,
        eta = 0).
        """
        return add_noise(x0, noise, *self.level(t))

    def prediction(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Returns the x0 and the noise that the network predicts by its raw output (B, C, h, w) at x_t."""
        alpha, sigma = (_per_sample(value, x) for value in self.level(t))
        kind = PREDICTION_TYPES[self.prediction_type]
        return Prediction(kind.x0(output, x, alpha, sigma), kind.noise(output, x, alpha, sigma))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the output (B, C, h, w) that the network is trained to give at x_t."""
        alpha, sigma = (_per_sample(value, x0) for value in self.level(t))
        return PREDICTION_TYPES[self.prediction_type].target(x0, noise, alpha, sigma)

    def x0_of_step(self, x: Tensor, t: Tensor, arrived: Tensor, s: Tensor) -> Tensor:
        """Returns the x0 (B, C, h, w) whose deterministic DDIM step leads from x at t (B,) to `arrived` at s (B,)."""
        levels = ([_per_sample(value, x) for value in self.level(times)] for times in (t, s))
        (alpha, sigma), (alpha_s, sigma_s) = levels
        kept = sigma_s / sigma
        return (arrived - kept * x) / (alpha_s - kept * alpha)

    def renoise(self, x: Tensor, noise: Tensor, below: Tensor, t: Tensor) -> Tensor:
        """Returns the state (B, C, h, w) at t of the state x at `below`, a timestep at or below t, with new noise.

        x is scaled by alpha_t / alpha_below, and the noise by what keeps the variance at 1, for a variance-preserving
        schedule.
        """
        (alpha, _), (start, _) = self.level(t), self.level(below)
        kept = alpha / start
        return add_noise(x, noise, kept, (1 - kept.square()).clamp(min=0).sqrt())


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns alpha x0 + sigma noise (B, C, h, w)."""
    return _per_sample(alpha, x0) * x0 + _per_sample(sigma, x0) * noise


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (like.ndim - 1)) if value.ndim == 1 else value
