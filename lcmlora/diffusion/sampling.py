"""Drawing of latents by the student's sampler, and by the solvers that it is compared with.

Random numbers depend on (seed, index of the picture, step) alone, so a picture does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lcmlora.adapters.metadata import LATENT_CONSISTENCY, Sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.diffusion import samplers, solver
from lcmlora.diffusion.editing import SourceLatents
from lcmlora.diffusion.noise import generator
from lcmlora.diffusion.samplers import StudentSampler
from lcmlora.diffusion.solver_settings import SolverSettings

Predict = Callable[[Tensor, Tensor], Tensor]  # (B, C, h, w) latents and a timestep () -> raw model output, guided


def initial_noise(shape: Sequence[int], seed: int, indices: Sequence[int], step: int = 0) -> Tensor:
    """Returns noise (N, C, h, w) fp32 on the CPU for the pictures `indices`, from a generator for each.

    Args:
        shape: (C, h, w).
        step: 0 for the initial noise; n for the noise that the student's n-th step adds.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, i, step)) for i in indices])


def text_conditioning(base: LoadedBase, captions: Sequence[str]) -> Conditioning:
    """Returns the conditioning on these captions, a row for each, with `micro_conditioning`."""
    return base.encode_text(list(captions)) | base.micro_conditioning(rows=len(captions))


def unconditional(base: LoadedBase) -> Conditioning:
    """Returns the unconditional counterpart of `text_conditioning`, one row."""
    return base.unconditional() | base.micro_conditioning()


@torch.no_grad()
def sample_student(
    base: LoadedBase,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    sampler: Sampler = LATENT_CONSISTENCY,
    source: SourceLatents | None = None,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Returns latents (B, C, h, w) fp32 on the base's device, drawn by the student, whose adapter is active.

    Args:
        conditioning: a row for each picture, see `text_conditioning`.
        noise: (B, C, h, w) fp32 of unit variance, see `initial_noise`.
        guidance_scale: in the pipelines' convention, u + guidance_scale (c - u); 1 is one pass without `unconditional`.
        unconditional: one row; the conditional and the unconditional pass are one batch.
        seed, indices: the keys of the noise that the student adds between its steps; a single step needs none.
        source: the picture to start from, on the base's device; None starts from noise alone.
        fresh: returns the noise (B, C, h, w) fp32 that the student adds after its n-th step, in place of that of the
            keys. It is called for the steps in their order.

    Raises:
        ValueError: no steps, more than the sampler's grid has at the source's strength, guidance without
            `unconditional`, or no `indices`.
    """
    if steps < 1:
        raise ValueError(f"the student needs at least 1 step, got {steps}")
    if steps > 1 and fresh is None and (indices is None or len(indices) != len(noise)):
        raise ValueError(f"the student adds noise between its {steps} steps and needs the index of each picture")
    latents = noise.to(base.device, torch.float32)
    predict = _predictor(base, conditioning, guidance_scale, unconditional)

    def keyed(step: int) -> Tensor:
        return initial_noise(noise.shape[1:], seed, indices or (), step).to(base.device)

    strength = 1.0 if source is None else source.strength
    timesteps = solver.student_timesteps(len(base.schedule), sampler.grid, steps, strength)
    return _draw_student(predict, latents, timesteps, samplers.make(sampler, base.schedule), fresh or keyed, source)


@torch.no_grad()
def sample_solver(
    base: LoadedBase,
    conditioning: Conditioning,
    noise: Tensor,
    settings: SolverSettings,
    *,
    unconditional: Conditioning | None = None,
) -> Tensor:
    """Returns latents (B, C, h, w) fp32 on the base's device, drawn by a solver. It adds no noise on the way.

    `trailing` timesteps (arXiv 2305.08891) start at T - 1, where noise alone is the right input, while `leading`, the
    default of many a base, starts 4 steps at t = 751 and 1 step at t = 1 with pure noise. At 50 steps trailing is 19,
    39, ..., 999, the timesteps on which the student was distilled. DPM-Solver++ is its multistep second-order form; it
    and UniPC end with a first-order step below 15 steps, which is their stable choice there.

    Args:
        conditioning, noise, unconditional: see `sample_student`.

    Raises:
        ValueError: guidance without `unconditional`.
    """
    latents = noise.to(base.device, torch.float32)
    predict = _predictor(base, conditioning, settings.guidance_scale, unconditional)
    # Timesteps stay on the CPU: the schedulers index their tables with them, which would wait for a GPU at each step.
    scheduler = _scheduler(base, settings)
    scheduler.set_timesteps(settings.steps)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def _predictor(
    base: LoadedBase, conditioning: Conditioning, guidance_scale: float, unconditional: Conditioning | None
) -> Predict:
    if guidance_scale == 1:
        return lambda x, t: base.predict(x, t.to(base.device).expand(len(x)), conditioning)
    if unconditional is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs the unconditional embedding")
    both = {name: torch.cat([row, unconditional[name].expand_as(row)]) for name, row in conditioning.items()}
    w = torch.tensor(guidance_scale - 1.0, device=base.device)  # the papers' convention

    def guided(x: Tensor, t: Tensor) -> Tensor:
        output = base.predict(torch.cat([x, x]), t.to(base.device).expand(2 * len(x)), both)
        return solver.guide(output[: len(x)], output[len(x) :], w)

    return guided


def _draw_student(
    predict: Predict,
    noise: Tensor,
    timesteps: list[int],
    sampler: StudentSampler,
    fresh: Callable[[int], Tensor],
    source: SourceLatents | None,
) -> Tensor:
    schedule = sampler.schedule
    latents = noise
    if source is not None:
        latents = source.noisy(noise, schedule, timesteps[0], most=timesteps[0] == len(schedule) - 1)
    rows = [torch.tensor([t], device=latents.device) for t in [*timesteps, 0]]
    for step, (t, s) in enumerate(pairwise(rows), start=1):
        prediction = schedule.prediction(predict(latents, t), latents, t)
        is_last = step == len(timesteps)
        if sampler.adds_noise and not is_last:
            latents = sampler.step(latents, prediction, t, s, fresh(step))
        else:
            latents = sampler.jump(latents, prediction, t, s)
        if source is not None:
            latents = source.keep(latents, noise, schedule, None if is_last else timesteps[step])
    return latents


def _scheduler(base: LoadedBase, settings: SolverSettings) -> Any:
    import diffusers

    karras = {"use_karras_sigmas": settings.karras}
    final = {
        "final_sigmas_type": "zero" if settings.final == "zero" else "sigma_min",
        "euler_at_final": settings.final == "euler_at_final",
    }
    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        # Latents are not confined to [-1, 1], so clipping (DDIM's default) would cut pictures.
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
        "dpm++": (
            diffusers.DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True, **karras, **final},
        ),
        "unipc": (diffusers.UniPCMultistepScheduler, {"lower_order_final": True, **karras}),
        "euler": (diffusers.EulerDiscreteScheduler, karras),
    }
    cls, options = makers[settings.solver]
    return cls.from_config(base.scheduler_config, timestep_spacing=settings.spacing, **options)
