from __future__ import annotations

import numpy as np
import pytest
import torch

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.schedule import Schedule
from lcmlora.diffusion import samplers
from lcmlora.releases import clients
from lcmlora.releases.clients import Instructions, Student
from tests.support import client_schedules as formulas

LEVELS = formulas.stable_diffusion()
SCHEDULE = Schedule.variance_preserving(torch.tensor(1 / (1 + LEVELS**2)), "epsilon")
LCM, TCD = Sampler(), Sampler("TCDScheduler", 0.3)
FILE = "lcm-lora-sd15.safetensors"


def told(sampler: Sampler, steps: int, schedule: Schedule = SCHEDULE) -> dict[str, Instructions]:
    return {each.client: each for each in clients.instructions(Student.of(sampler, schedule, steps), FILE)}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_programs_evaluate_the_network_where_the_instructions_say(steps: int) -> None:
    kept = formulas.distilled(LEVELS)
    by_formula = {
        "ComfyUI": formulas.simple(kept, steps),
        "A1111 from 1.10, Forge": formulas.simple(kept, steps),
        "A1111 1.8": formulas.automatic(kept, steps, 20),
    }
    found = told(LCM, steps)
    for client, levels in by_formula.items():
        assert found[client].timesteps == [formulas.told(kept, level, 20) for level in levels], client
    whole = [int(np.abs(LEVELS - level).argmin()) for level in formulas.simple(LEVELS, steps)]
    assert told(TCD, steps)["ComfyUI without further nodes"].timesteps == whole
    assert told(TCD, steps)["A1111 from 1.10, Forge"].timesteps == whole


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_instructions_without_a_deviation_give_the_adapters_own_noise_levels(steps: int) -> None:
    own = [float(LEVELS[t]) for t in Student.of(LCM, SCHEDULE, steps).timesteps]
    assert formulas.simple(formulas.distilled(LEVELS), steps) == pytest.approx(own)
    exact = [client for client, each in told(LCM, steps).items() if each.deviation is None]
    assert {"ComfyUI", "A1111 from 1.10, Forge", "InvokeAI"} <= set(exact)
    assert told(TCD, steps)["ComfyUI with JettHu/ComfyUI-TCD"].deviation is None


def test_schedules_that_differ_are_said_to() -> None:
    kept = formulas.distilled(LEVELS)
    for steps in (2, 4, 8):
        own = [float(LEVELS[t]) for t in Student.of(LCM, SCHEDULE, steps).timesteps]
        assert formulas.sgm_uniform(kept, steps, 20) != pytest.approx(own)
        assert told(LCM, steps)["A1111 1.9"].deviation
        assert told(LCM, steps)["A1111 1.8"].deviation
    assert "2 steps are 1" in (told(LCM, 2)["A1111 1.8"].deviation or "")


def test_an_adapter_of_another_grid_is_nowhere_called_exact() -> None:
    assert all(each.deviation for each in told(Sampler(grid=20), 4).values())


def test_the_ancestral_eta_adds_the_noise_of_strategic_stochastic_sampling() -> None:
    timesteps = Student.of(TCD, SCHEDULE, 2).timesteps
    eta = clients.ancestral_eta(TCD, SCHEDULE, 2)  # with one step between two evaluations the mean is the one
    _, up = formulas.ancestral(float(LEVELS[timesteps[0]]), float(LEVELS[timesteps[1]]), eta)
    sampler = samplers.make(TCD, SCHEDULE)
    t, s = (torch.tensor([each]) for each in timesteps)
    state, noise = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    prediction = SCHEDULE.prediction(torch.zeros_like(state), state, t)
    moved = sampler.step(state, prediction, t, s, noise) / SCHEDULE.alpha[s]
    assert up == pytest.approx(moved.item(), rel=1e-3)


def test_the_ancestral_eta_of_stable_diffusion() -> None:
    assert clients.ancestral_eta(TCD, SCHEDULE, 4) == pytest.approx(0.855, abs=0.005)  # 0.95, 0.86, 0.76
    assert "eta 0.85" in told(TCD, 4)["ComfyUI without further nodes"].settings[1]


def test_samplers_for_latent_consistency_are_kept_from_bases_that_predict_v() -> None:
    schedule = Schedule.variance_preserving(torch.tensor(1 / (1 + LEVELS**2)), "v_prediction")
    settings = [line for each in told(LCM, 4, schedule).values() for line in each.settings]
    assert not any("sampling `lcm`" in line or "method `LCM`" in line for line in settings)
    assert not any("ComfyUI-TCD" in client for client in told(TCD, 4, schedule))


@pytest.mark.parametrize("strength", [tenth / 10 for tenth in range(1, 11)])
def test_the_steps_for_diffusers_are_the_fewest_that_make_so_many_evaluations(strength: float) -> None:
    for evaluations in (1, 2, 4, 8):
        steps = clients.diffusers_steps(evaluations, strength)
        assert int(steps * strength) == evaluations > int((steps - 1) * strength)
    assert clients.diffusers_steps(4, 0.5) == 8
