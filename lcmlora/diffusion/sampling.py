"""Drawing latents: the student's few steps, and the solvers it is compared with, behind one function.

Every random number belongs to a picture, by (seed, index, step), so a picture does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lcmlora.bases.base import Conditioning, LoadedBase
from lcmlora.diffusion import solver
from lcmlora.noise import generator

SOLVERS = ("ddim", "dpm++", "unipc", "euler")
STUDENT = "lcm"

Predict = Callable[[Tensor, Tensor], Tensor]  # (B, C, h, w) latents and a timestep () -> raw model output, guided


def initial_noise(shape: Sequence[int], seed: int, indices: Sequence[int], step: int = 0) -> Tensor:
    """Returns the noise (N, C, h, w) fp32 on the CPU of the pictures `indices`, each drawn from a generator of its own.

    Args:
        shape: (C, h, w).
        step: 0 for what a picture starts from; the n-th step of the student ends by adding that of step n.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, i, step)) for i in indices])


def network_evaluations(method: str, steps: int, guidance_scale: float) -> int:
    """Returns how often the network is evaluated for one picture: a guided step costs two, whatever the batching."""
    _check(method, steps)
    return steps * (1 if guidance_scale == 1 else 2)


def text_conditioning(base: LoadedBase, captions: Sequence[str]) -> Conditioning:
    """Returns what `sample` needs of these captions, one row for each; with time_ids for the SDXL family."""
    return _with_time_ids(base, base.encode_text(list(captions)))


def unconditional(base: LoadedBase) -> Conditioning:
    """Returns the unconditional counterpart of `text_conditioning`, one row."""
    return _with_time_ids(base, base.unconditional())


def _with_time_ids(base: LoadedBase, conditioning: Conditioning) -> Conditioning:
    if base.kind != "sdxl":
        return conditioning
    return conditioning | {"time_ids": base.time_ids(rows=len(conditioning["encoder_hidden_states"]))}


@torch.no_grad()
def sample(
    base: LoadedBase,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    method: str,
    steps: int,
    guidance_scale: float = 1.0,
    unconditional: Conditioning | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    grid: int = 50,
    gamma: float | None = None,
    spacing: str = "trailing",
) -> Tensor:
    """Returns latents (B, C, h, w) fp32 on the base's device.

    The solvers take `trailing` timesteps (arXiv 2305.08891): they start at T - 1, where noise alone is the right input,
    while `leading`, the default of many a base, starts 4 steps at t = 751 and 1 step at t = 1 with pure noise. At 50
    steps trailing is 19, 39, ..., 999, the grid on which the student was distilled. DPM-Solver++ is its multistep
    second-order form; it and UniPC end with a first-order step, which is their stable choice below 15 steps.

    Args:
        conditioning: one row for each picture, see `text_conditioning`.
        noise: (B, C, h, w) fp32 of unit variance, see `initial_noise`.
        method: "lcm", the student (its adapter active in `base.unet`), or one of SOLVERS.
        guidance_scale: the pipelines' convention, u + guidance_scale (c - u); 1 is one pass without `unconditional`.
        unconditional: one row; conditional and unconditional pass go through the network as one batch.
        seed, indices: whose noise the student adds between its steps; solvers and a single step need none.
        grid: the student's steps are taken from this many points (`original_inference_steps` of its scheduler).
        gamma: of a student that is drawn with by TCDScheduler; None is LCMScheduler's way.
        spacing: trailing, leading or linspace, for the solvers.

    Raises:
        ValueError: an unknown method, no steps, guidance without `unconditional`, or a student without `indices`.
    """
    _check(method, steps)
    latents = noise.to(base.device, torch.float32)
    predict = _predictor(base, conditioning, guidance_scale, unconditional)
    if method != STUDENT:
        return _solve(base, predict, latents, _scheduler(base, method, spacing), steps)
    if steps > 1 and (indices is None or len(indices) != len(noise)):
        raise ValueError(f"the student adds noise between its {steps} steps and needs the index of each picture")

    def fresh(step: int) -> Tensor:
        return initial_noise(noise.shape[1:], seed, indices or (), step).to(base.device)

    timesteps = solver.student_timesteps(len(base.schedule), grid, steps)
    if gamma is None:
        return _jumps_to_zero(base, predict, latents, timesteps, fresh)
    return _jumps_along(base, predict, latents, timesteps, fresh, gamma)


def _check(method: str, steps: int) -> None:
    if method not in (STUDENT, *SOLVERS):
        raise ValueError(f"unknown method {method!r}; there are {', '.join((STUDENT, *SOLVERS))}")
    if steps < 1:
        raise ValueError(f"{method} needs at least 1 step, got {steps}")


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


# --- the student ------------------------------------------------------------------------------------------------


def _jumps_to_zero(
    base: LoadedBase, predict: Predict, latents: Tensor, timesteps: list[int], fresh: Callable[[int], Tensor]
) -> Tensor:
    """Multistep consistency sampling (arXiv 2310.04378, Algorithm 3): jump to x0, add noise up to the next timestep."""
    rows = [torch.tensor([t], device=base.device) for t in timesteps]
    for step, t in enumerate(rows, start=1):
        x0 = base.schedule.prediction(predict(latents, t), latents, t).x0
        latents = solver.consistency(latents, x0, t)
        if step < len(rows):
            latents = base.schedule.state(latents, fresh(step), rows[step])
    return latents


def _jumps_along(
    base: LoadedBase,
    predict: Predict,
    latents: Tensor,
    timesteps: list[int],
    fresh: Callable[[int], Tensor],
    gamma: float,
) -> Tensor:
    """Strategic stochastic sampling (arXiv 2402.19159, Algorithm 4): jump to floor((1 - gamma) t'), below the next
    timestep t', and add noise up to it. Without noise for gamma 0."""
    for step, (start, end) in enumerate(zip(timesteps, [*timesteps[1:], 0], strict=True), start=1):
        t, following = (torch.tensor([row], device=base.device) for row in (start, end))
        below = ((1 - gamma) * following).long()  # in fp32, as diffusers multiplies
        prediction = base.schedule.prediction(predict(latents, t), latents, t)
        latents = base.schedule.state(*prediction, below)
        if gamma and step < len(timesteps):
            latents = base.schedule.renoise(latents, fresh(step), below, following)
    return latents


# --- the solvers ------------------------------------------------------------------------------------------------


def _scheduler(base: LoadedBase, method: str, spacing: str) -> Any:
    import diffusers

    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        # Latents are not confined to [-1, 1], so clipping (DDIM's default) would cut pictures.
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
        "dpm++": (
            diffusers.DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True},
        ),
        "unipc": (diffusers.UniPCMultistepScheduler, {"lower_order_final": True}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
    }
    cls, options = makers[method]
    return cls.from_config(base.scheduler_config, timestep_spacing=spacing, **options)


def _solve(base: LoadedBase, predict: Predict, latents: Tensor, scheduler: Any, steps: int) -> Tensor:
    # Timesteps stay on the CPU: the schedulers index their tables with them, which would wait for a GPU at each step.
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(latents, t), t.long())
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents
