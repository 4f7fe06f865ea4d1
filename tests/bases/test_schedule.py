from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from lcmlora.bases.schedule import Schedule
from lcmlora.demo.pretrain import SCHEDULE
from lcmlora.diffusion.solver import ddim_grid

TYPES = ("epsilon", "v_prediction", "sample")
CUMPROD = DDIMScheduler(**SCHEDULE).alphas_cumprod


def _noise(kind: str = "epsilon") -> Schedule:
    return Schedule.variance_preserving(CUMPROD, kind)


def _state(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 4, 8, 8, generator=generator)


def test_the_table_is_the_square_roots_of_the_cumulated_alphas_to_the_bit():
    schedule = _noise()
    assert len(schedule) == 1000 and schedule.time.tolist() == list(range(1000))
    for t in (0, 19, 500, 999):
        alpha, sigma = schedule.level(torch.tensor([t]))
        assert torch.equal(alpha[0], CUMPROD[t].sqrt()) and torch.equal(sigma[0], (1 - CUMPROD[t]).sqrt())


@pytest.mark.parametrize("kind", TYPES)
def test_x0_and_noise_are_recovered_from_what_the_network_is_trained_to_give(kind: str):
    (x0, noise), schedule = _state(), _noise(kind)
    t = torch.tensor([0, 19, 500, 999])
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in schedule.level(t))
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[kind]
    assert torch.equal(schedule.target(x0, noise, t), output)
    found = schedule.prediction(output, schedule.state(x0, noise, t), t)
    torch.testing.assert_close(found.x0, x0, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found.noise, noise, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_the_state_of_a_prediction_is_diffusers_ddim_step_at_all_50_timesteps(kind: str, to_one: bool):
    (x, output), schedule = _state(), _noise(kind)
    options = {"prediction_type": kind, "timestep_spacing": "trailing", "set_alpha_to_one": to_one}
    scheduler = DDIMScheduler(**SCHEDULE | options)
    scheduler.set_timesteps(50)
    upper, lower = ddim_grid(1000, 50)
    assert scheduler.timesteps.tolist() == upper.flip(0).tolist()
    for t, t_prev in zip(upper, lower, strict=True):
        found = schedule.prediction(output, x, t.view(1))
        # The papers end at alpha_0; to one is the clean picture.
        ours = found.x0 if to_one and t == 19 else schedule.state(*found, t_prev.view(1))
        assert (ours - scheduler.step(output, int(t), x).prev_sample).abs().max() <= 1e-5


@pytest.mark.parametrize(("t", "s"), [(999, 799), (999, 0), (499, 479)])
def test_the_x0_of_a_step_is_found_from_where_it_begins_and_ends(t: int, s: int):
    (x0, noise), schedule = _state(), _noise()
    start, end = torch.tensor([t]), torch.tensor([s])
    found = schedule.x0_of_step(schedule.state(x0, noise, start), start, schedule.state(x0, noise, end), end)
    torch.testing.assert_close(found, x0, atol=1e-3, rtol=1e-3)


def test_new_noise_brings_a_state_to_the_level_of_a_noisier_timestep():
    schedule, (x0, noise), (other, _) = _noise(), _state(), (_state()[1].flip(0), None)
    below, t = torch.tensor([0, 200, 499, 800]), torch.tensor([19, 499, 499, 999])
    x = schedule.renoise(schedule.state(x0, noise, below), other, below, t)
    (alpha, sigma), (start, low) = schedule.level(t), schedule.level(below)
    kept = alpha / start
    assert torch.allclose((kept * low).square() + 1 - kept.square(), sigma.square(), atol=1e-6)  # its variance
    assert torch.equal(x[2], schedule.state(x0, noise, t)[2])  # from a timestep to itself
    # TCDScheduler's own step (arXiv 2402.19159, Algorithm 4), by way of floor(0.7 t') to its next timestep t'.
    scheduler = TCDScheduler(**SCHEDULE | {"prediction_type": "epsilon"})
    scheduler.set_timesteps(4, original_inference_steps=50)
    assert scheduler.timesteps[:2].tolist() == [999, 749]
    fresh = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    expected = scheduler.step(noise, 999, x0, eta=0.3, generator=torch.Generator().manual_seed(5)).prev_sample
    t, below, following = (torch.tensor([row]) for row in (999, 524, 749))
    found = schedule.state(*schedule.prediction(noise, x0, t), below)
    torch.testing.assert_close(schedule.renoise(found, fresh, below, following), expected, atol=1e-4, rtol=1e-4)


def test_the_time_input_of_the_network_is_the_tables():
    schedule = replace(_noise(), time=1 - torch.arange(1000) / 1000)
    assert schedule.time[torch.tensor([250])].item() == 0.75


def test_a_schedule_of_an_unknown_type_or_of_unequal_columns_is_refused():
    with pytest.raises(ValueError, match="'flow'"):
        _noise("flow")
    with pytest.raises(ValueError, match=r"must be \(T,\), got \(1000,\), \(1000,\) and \(3,\)"):
        replace(_noise(), time=torch.arange(3))
