"""The student's samplers against diffusers' LCMScheduler and TCDScheduler, the
solvers against diffusers' pipeline, and their cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.diffusion import sampling
from lcmlora.diffusion.noise import generator
from lcmlora.diffusion.solver import student_timesteps

CAPTIONS = ["red apple", "green tree", "fruit"]
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


@contextmanager
def inputs_of_the_network(base: LoadedBase) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list that fills with the (latents, timesteps) of every forward of the UNet."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = base.network.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), args[1].clone())))
    yield seen
    hook.remove()


def noise(base: LoadedBase, count: int = 3, seed: int = 5) -> Tensor:
    return sampling.initial_noise(base.latent_shape, seed, range(count))


def test_noise_depends_on_seed_picture_and_step_and_not_on_the_batch() -> None:
    whole = sampling.initial_noise((4, 8, 8), 7, range(6))
    assert torch.equal(whole[4:], sampling.initial_noise((4, 8, 8), 7, [4, 5]))
    others = [sampling.initial_noise((4, 8, 8), seed, [i], step) for seed, i, step in [(8, 3, 0), (7, 4, 0), (7, 3, 1)]]
    assert all((whole[3] - other).abs().max() > 0.1 for other in others)
    many = sampling.initial_noise((4, 16, 16), 0, range(64))
    assert abs(many.mean().item()) < 0.02 and abs(many.std().item() - 1) < 0.02


def test_the_students_timesteps_are_those_of_diffusers_for_every_step_count() -> None:
    from diffusers import LCMScheduler

    assert student_timesteps(1000, 50, 4) == [999, 759, 499, 259]
    scheduler = LCMScheduler()
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert student_timesteps(1000, 50, steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_students_steps_are_those_of_diffusers_lcm_scheduler(
    base: LoadedBase, prediction_type: str, steps: int
) -> None:
    from diffusers import LCMScheduler

    base = replace(base, schedule=replace(base.schedule, prediction_type=prediction_type))
    conditioning = sampling.text_conditioning(base, CAPTIONS)
    with inputs_of_the_network(base) as ours:
        drawn = sampling.sample(base, conditioning, noise(base), method="lcm", steps=steps, seed=5, indices=range(3))

    scheduler = LCMScheduler.from_config(base.scheduler_config, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    latents = noise(base)
    with inputs_of_the_network(base) as theirs, torch.no_grad():
        for step, t in enumerate(scheduler.timesteps, start=1):
            output = base.predict(latents, t.expand(3), conditioning)
            generators = [generator(5, i, step) for i in range(3)]
            latents = scheduler.step(output, t, latents, generator=generators, return_dict=False)[0]
    assert len(ours) == len(theirs) == steps
    for (mine, my_time), (other, their_time) in zip(ours, theirs, strict=True):
        assert torch.equal(my_time, their_time)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_students_steps_are_those_of_diffusers_tcd_scheduler(
    base: LoadedBase, prediction_type: str, gamma: float, steps: int
) -> None:
    from diffusers import TCDScheduler

    base = replace(base, schedule=replace(base.schedule, prediction_type=prediction_type))
    conditioning = sampling.text_conditioning(base, CAPTIONS)
    options = {"method": "lcm", "steps": steps, "seed": 5, "indices": range(3)}
    drawn = sampling.sample(base, conditioning, noise(base), sampler=Sampler("TCDScheduler", gamma), **options)  # type: ignore[arg-type]

    scheduler = TCDScheduler.from_config(base.scheduler_config, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    latents = noise(base)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps, start=1):
            output = base.predict(latents, t.expand(3), conditioning)
            generators = [generator(5, i, step) for i in range(3)]
            latents = scheduler.step(output, t, latents, eta=gamma, generator=generators, return_dict=False)[0]
    torch.testing.assert_close(drawn, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("method", sampling.SOLVERS)
def test_a_guided_solver_draws_what_plain_diffusers_draws(
    base: LoadedBase, base_folder: Path, method: str, spacing: str
) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base_folder)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, SCHEDULERS[method])
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    theirs = pipeline(
        CAPTIONS,
        num_inference_steps=5,
        guidance_scale=7.5,
        latents=noise(base),
        output_type="latent",
        height=16,
        width=16,
    ).images
    ours = sampling.sample(
        base,
        sampling.text_conditioning(base, CAPTIONS),
        noise(base),
        method=method,
        steps=5,
        guidance_scale=7.5,
        unconditional=sampling.unconditional(base),
        spacing=spacing,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [*sampling.SOLVERS, "lcm"])
@pytest.mark.parametrize("guidance", [1.0, 8.5])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_network_evaluations_are_the_rows_that_went_through_the_network(
    base: LoadedBase, method: str, guidance: float, steps: int
) -> None:
    with inputs_of_the_network(base) as seen:
        drawn = sampling.sample(
            base,
            sampling.text_conditioning(base, CAPTIONS),
            noise(base),
            method=method,
            steps=steps,
            guidance_scale=guidance,
            unconditional=sampling.unconditional(base),
            indices=range(3),
        )
    assert drawn.isfinite().all() and drawn.dtype == torch.float32
    assert len(seen) == steps  # conditional and unconditional in one pass
    assert seen[0][1].tolist() == [999] * len(seen[0][0])  # trailing, at every step count
    assert sum(len(latents) for latents, _ in seen) == 3 * sampling.network_evaluations(method, steps, guidance)


@pytest.mark.parametrize("method", ["lcm", "dpm++"])
def test_a_picture_does_not_depend_on_its_batch(base: LoadedBase, method: str) -> None:
    def draw(indices: list[int]) -> Tensor:
        conditioning = sampling.text_conditioning(base, [CAPTIONS[i] for i in indices])
        start = sampling.initial_noise(base.latent_shape, 3, indices)
        return sampling.sample(base, conditioning, start, method=method, steps=4, seed=3, indices=indices)

    torch.testing.assert_close(draw([0, 1, 2])[2:], draw([2]), rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_refused_with_their_value(base: LoadedBase) -> None:
    conditioning = sampling.text_conditioning(base, CAPTIONS)
    for options, message in [
        ({"method": "plms", "steps": 4}, "unknown method 'plms'"),
        ({"method": "ddim", "steps": 0}, "at least 1 step, got 0"),
        ({"method": "ddim", "steps": 4, "guidance_scale": 7.5}, "needs the unconditional"),
        ({"method": "lcm", "steps": 4}, "index of each picture"),
        ({"method": "lcm", "steps": 51, "indices": range(3)}, "50 timesteps"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampling.sample(base, conditioning, noise(base), **options)  # type: ignore[arg-type]
