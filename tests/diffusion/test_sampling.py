"""The student's samplers against diffusers' LCMScheduler and TCDScheduler, the
solvers against diffusers' pipeline, and their cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from lcmlora.diffusion.solver_settings import SOLVERS, SPACINGS, SolverSettings, finals
from lcmlora.evaluation.image_sets import StudentSettings
from lcmlora.settings.evaluation import KARRAS, Final, Spacing

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


def draw(
    base: LoadedBase, method: str, steps: int, guidance: float, indices: Sequence[int] = range(3)
) -> tuple[Tensor, int]:
    """Returns latents of CAPTIONS, drawn by the student or by a solver, and the evaluations that a picture takes."""
    conditioning = sampling.text_conditioning(base, [CAPTIONS[i] for i in indices])
    start, unconditional = sampling.initial_noise(base.latent_shape, 5, indices), sampling.unconditional(base)
    if method == "student":
        options = StudentSettings(steps, guidance_scale=guidance)
        drawn = sampling.sample_student(
            base,
            conditioning,
            start,
            steps=steps,
            guidance_scale=guidance,
            unconditional=unconditional,
            seed=5,
            indices=indices,
        )
        return drawn, options.evaluations
    solver = SolverSettings.of(method, steps, guidance)
    return sampling.sample_solver(base, conditioning, start, solver, unconditional=unconditional), solver.evaluations


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
        drawn = sampling.sample_student(base, conditioning, noise(base), steps=steps, seed=5, indices=range(3))

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
    sampler = Sampler("TCDScheduler", gamma)
    drawn = sampling.sample_student(
        base, conditioning, noise(base), steps=steps, seed=5, indices=range(3), sampler=sampler
    )

    scheduler = TCDScheduler.from_config(base.scheduler_config, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    latents = noise(base)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps, start=1):
            output = base.predict(latents, t.expand(3), conditioning)
            generators = [generator(5, i, step) for i in range(3)]
            latents = scheduler.step(output, t, latents, eta=gamma, generator=generators, return_dict=False)[0]
    torch.testing.assert_close(drawn, latents, rtol=1e-4, atol=1e-4)


OPTIONS = [
    (solver, spacing, karras, final)
    for solver in SOLVERS
    for spacing in SPACINGS
    for karras in ((False, True) if solver in KARRAS else (False,))
    for final in finals(solver, steps=15)
]


def settings(options: tuple[str, Spacing, bool, Final], steps: int, guidance_scale: float) -> SolverSettings:
    solver, spacing, karras, final = options
    return SolverSettings.of(solver, steps, guidance_scale, spacing=spacing, karras=karras, final=final)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_guided_solver_draws_what_plain_diffusers_draws(
    base: LoadedBase, base_folder: Path, options: tuple[str, Spacing, bool, Final]
) -> None:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base_folder)
    pipeline.set_progress_bar_config(disable=True)
    solver, spacing, karras, final = options
    changes: dict[str, object] = {"timestep_spacing": spacing}
    changes |= {"use_karras_sigmas": True} if karras else {}
    changes |= {"final_sigmas_type": "sigma_min"} if final != "zero" else {}
    changes |= {"euler_at_final": True} if final == "euler_at_final" else {}
    scheduler = getattr(diffusers, SCHEDULERS[solver])
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **changes)
    theirs = pipeline(
        CAPTIONS,
        num_inference_steps=5,
        guidance_scale=7.5,
        latents=noise(base),
        output_type="latent",
        height=16,
        width=16,
    ).images
    ours = sampling.sample_solver(
        base,
        sampling.text_conditioning(base, CAPTIONS),
        noise(base),
        settings(options, 5, 7.5),
        unconditional=sampling.unconditional(base),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [*SOLVERS, "student"])
@pytest.mark.parametrize("guidance", [1.0, 8.5])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_network_evaluations_are_the_rows_that_went_through_the_network(
    base: LoadedBase, method: str, guidance: float, steps: int
) -> None:
    with inputs_of_the_network(base) as seen:
        drawn, evaluations = draw(base, method, steps, guidance)
    assert drawn.isfinite().all() and drawn.dtype == torch.float32
    assert len(seen) == steps  # conditional and unconditional in one pass
    assert seen[0][1].tolist() == [999] * len(seen[0][0])  # trailing, at every step count
    assert sum(len(latents) for latents, _ in seen) == 3 * evaluations


@pytest.mark.parametrize("steps", [1, 2, 3, 16])
def test_every_combination_of_options_draws_finite_pictures_that_differ(base: LoadedBase, steps: int) -> None:
    conditioning = sampling.text_conditioning(base, CAPTIONS[:1])
    drawn = {
        options: sampling.sample_solver(base, conditioning, noise(base, 1), settings(options, steps, 1.0))
        for options in OPTIONS
        if options[3] in finals(options[0], steps)
    }
    assert all(latents.isfinite().all() for latents in drawn.values())
    plain = drawn["dpm++", "trailing", False, "zero"]
    for options in (("dpm++", "leading", False, "zero"), ("dpm++", "trailing", False, "sigma_min")):
        assert not torch.equal(drawn[options], plain)
    if steps > 2:  # the first and the last noise level are the same
        assert not torch.equal(drawn["dpm++", "trailing", True, "zero"], plain)
    if steps == 16:
        ends = [drawn["dpm++", "trailing", False, final] for final in finals("dpm++", steps)]
        assert not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("method", ["student", "dpm++"])
def test_a_picture_does_not_depend_on_its_batch(base: LoadedBase, method: str) -> None:
    whole, _ = draw(base, method, 4, 1.0)
    alone, _ = draw(base, method, 4, 1.0, indices=[2])
    torch.testing.assert_close(whole[2:], alone, rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_refused_with_their_value(base: LoadedBase) -> None:
    conditioning = sampling.text_conditioning(base, CAPTIONS)
    for options, message in [
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"steps": 4, "guidance_scale": 7.5, "indices": range(3)}, "needs the unconditional"),
        ({"steps": 4}, "index of each picture"),
        ({"steps": 51, "indices": range(3)}, "50 timesteps"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampling.sample_student(base, conditioning, noise(base), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the unconditional"):
        sampling.sample_solver(base, conditioning, noise(base), SolverSettings.of("ddim", 4, 7.5))
    for options, message in [
        ({"solver": "plms"}, "unknown solver 'plms'"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"karras": True}, "ddim has no Karras sigmas"),
        ({"final": "sigma_min"}, "an option of dpm\\+\\+, not of ddim"),
    ]:
        with pytest.raises(ValueError, match=message):
            SolverSettings.of(**{"solver": "ddim", "steps": 4, "guidance_scale": 1.0} | options)  # type: ignore[arg-type]
