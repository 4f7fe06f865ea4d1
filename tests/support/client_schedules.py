"""The noise levels at which programs evaluate the network, by their own formulas, each with its version and source.

Written out from the programs' code, not from lcmlora's: tests/releases/test_clients.py compares the two.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lcmlora.bases.schedule import Schedule

Levels = npt.NDArray[np.float64]


def stable_diffusion() -> Levels:
    """Returns sigma / alpha of the published Stable Diffusion 1 and XL schedule, (1000,)."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    return np.sqrt((1 - kept) / kept)


def schedule(prediction_type: str = "epsilon") -> Schedule:
    """Returns the schedule of these levels as lcmlora has it."""
    return Schedule.variance_preserving(torch.tensor(1 / (1 + stable_diffusion() ** 2)), prediction_type)


def distilled(levels: Levels) -> Levels:
    """ComfyUI a125cd84, comfy_extras/nodes_model_advanced.py, ModelSamplingDiscreteDistilled: 50 of 1000 levels.

    The same in stable-diffusion-webui 1.8, modules/sd_samplers_lcm.py, LCMCompVisDenoiser.
    """
    kept = np.zeros(50)
    for x in range(50):
        kept[50 - 1 - x] = levels[1000 - 1 - x * 20]
    return kept


def simple(sigmas: Levels, steps: int) -> list[float]:
    """ComfyUI a125cd84, comfy/samplers.py, simple_scheduler; stable-diffusion-webui 1.10, modules/sd_schedulers.py."""
    found = []
    for x in range(steps):
        found.append(float(sigmas[-(1 + int(x * (len(sigmas) / steps)))]))
    return found


def sgm_uniform(sigmas: Levels, steps: int, apart: int) -> list[float]:
    """stable-diffusion-webui 1.9, modules/sd_schedulers.py, sgm_uniform.

    Args:
        apart: timesteps between two kept levels, `skip_steps`.
    """
    return _levels(sigmas, np.linspace(999, apart - 1, steps + 1)[:-1], apart)


def automatic(sigmas: Levels, steps: int, apart: int) -> list[float]:
    """stable-diffusion-webui 1.8, modules/sd_samplers_lcm.py, LCMCompVisDenoiser.get_sigmas."""
    return _levels(sigmas, np.linspace(999, apart - 1, steps), apart)


def told(sigmas: Levels, level: float, apart: int) -> int:
    """The timestep that the network is told at a level: `sigma_to_t` of both programs' classes for 50 levels."""
    return int(np.abs(np.log(level) - np.log(sigmas)).argmin()) * apart + apart - 1


def ancestral(before: float, after: float, eta: float) -> tuple[float, float]:
    """k-diffusion, sampling.py, get_ancestral_step: down to the first level, then noise of the second."""
    up = min(after, eta * (after**2 * (before**2 - after**2) / before**2) ** 0.5)
    return (after**2 - up**2) ** 0.5, up


def _levels(sigmas: Levels, timesteps: Levels, apart: int) -> list[float]:
    index = np.clip((timesteps - (apart - 1)) / apart, 0, len(sigmas) - 1)
    return [float(level) for level in np.exp(np.interp(index, np.arange(len(sigmas)), np.log(sigmas)))]
