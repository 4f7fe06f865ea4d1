"""The solver timesteps, guidance, the student's timesteps, and the consistency function. All in fp32.

Tensors of shape (B,) are broadcast over (B, C, h, w) by the functions themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcmlora.bases.schedule import Schedule


def _wide(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (like.ndim - 1)) if value.ndim == 1 else value


def guide(conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """Returns c + w (c - u), the papers' convention: w (B,) is a pipeline's guidance_scale minus one."""
    return conditional + _wide(w, conditional) * (conditional - unconditional)


def ddim_grid(train_timesteps: int, points: int) -> tuple[Tensor, Tensor]:
    """Returns the solver timesteps t_{n+k} and the timesteps that the steps from them end at, both (points,) int64.

    Both are ascending. For T = 1000 and 50 points: 19, 39, ..., 999, ending at 0, 19, ..., 979 (k = T / points).

    Raises:
        ValueError: `points` does not divide `train_timesteps`.
    """
    if train_timesteps % points:
        raise ValueError(f"the grid must divide the schedule: {points} points of {train_timesteps} timesteps")
    skip = train_timesteps // points
    upper = torch.arange(1, points + 1) * skip - 1
    return upper, torch.cat([torch.zeros(1, dtype=torch.long), upper[:-1]])


def timesteps_at(grid: int, strength: float) -> int:
    """Returns how many of the student's timesteps a strength in [0, 1] leaves, the least noisy ones.

    It is diffusers' count (LCMScheduler.set_timesteps), without the rounding that makes 28 of 50 x 0.58.
    """
    return int(grid * strength + 1e-6)


def student_timesteps(train_timesteps: int, grid: int, steps: int, strength: float = 1.0) -> list[int]:
    """Returns the student's timesteps, evenly spaced by index in the descending grid: 999, 759, 499, 259 for 4 of 50.

    Args:
        strength: drawing starts from a picture; only the timesteps that this leaves are taken, see `timesteps_at`:
            399, 299, 199, 99 for 4 of 50 at 0.4.

    Raises:
        ValueError: more steps than the grid has points.
    """
    known = timesteps_at(grid, strength)
    if steps > known:
        raise ValueError(f"the student knows {known} timesteps, so it cannot take {steps} steps")
    upper, _ = ddim_grid(train_timesteps, grid)
    descending = upper[:known].flip(0)
    return [int(descending[i * known // steps]) for i in range(steps)]


def loss_weights(schedule: Schedule, t: Tensor, weighting: str) -> Tensor:
    """Returns the weight of the x0 error at each of the timesteps (N,), (N,) fp32 of mean 1.

    `uniform` is Algorithm 1 of arXiv 2310.04378. `snr+1` is 1 / sigma^2 (progressive distillation, arXiv 2202.00512,
    section 4). It gives most weight to the last step before the boundary, the only one whose target is not a
    prediction. Without it an adapter that is trained fast learns to pass noise through, which is consistent, too.

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting not in ("uniform", "snr+1"):
        raise ValueError(f"weighting must be uniform or snr+1, got {weighting!r}")
    _, sigma = schedule.level(t)
    weights = torch.ones_like(sigma) if weighting == "uniform" else sigma.pow(-2)
    return weights / weights.mean()


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """Returns c_skip and c_out (B,) fp32 of f(x, t) = c_skip x + c_out x0 (arXiv 2310.04378); the identity at t = 0."""
    scaled = t.float() * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2).sqrt()
    return c_skip, c_out


def consistency(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Returns f(x_t, t) (B, C, h, w), the consistency function with its boundary condition."""
    c_skip, c_out = boundary_scalings(t)
    return _wide(c_skip, x) * x + _wide(c_out, x) * x0
