import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

from lcmlora.bases.schedule import Prediction, Schedule
from lcmlora.demo.pretrain import SCHEDULE
from lcmlora.diffusion import objectives
from lcmlora.diffusion.objectives import Objective
from lcmlora.diffusion.solver import ddim_grid, student_timesteps
from tests.support.distillation import SETTINGS

NOISE = Schedule.variance_preserving(DDIMScheduler(**SCHEDULE).alphas_cumprod, "epsilon")
UPPER, LOWER = ddim_grid(1000, 50)
INDEX = torch.arange(50)


def _objective(name: str, **changes: object) -> Objective:
    return objectives.make(SETTINGS.model_copy(update={"objective": name} | changes), NOISE)


def _drawn(objective: Objective, rounds: int = 400) -> torch.Tensor:
    """Returns the destinations (rounds, 50) of the objective from each row of the solver timesteps."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([objective.destination(INDEX, torch.rand(50, 2, generator=generator)) for _ in range(rounds)])


@pytest.mark.parametrize("name", ["lcm", "tcd", "pcm", "tdd"])
def test_no_destination_lies_above_the_end_of_the_teachers_step(name: str):
    objective = _objective(name)
    drawn = _drawn(objective)
    assert (drawn >= 0).all() and (drawn <= LOWER).all()
    assert torch.isin(objective.reach(INDEX), torch.cat([LOWER, torch.tensor([0])])).all()
    assert (objective.reach(INDEX) <= LOWER).all()


def test_lcm_goes_to_zero_and_tcd_to_every_point_of_the_grid_below():
    assert not _drawn(_objective("lcm")).any()
    drawn = _drawn(_objective("tcd"), 4000)
    assert sorted(set(drawn[:, 10].tolist())) == LOWER[:11].tolist()
    counts = torch.bincount(torch.bucketize(drawn[:, 10], LOWER), minlength=11)
    assert counts.min() > 0.8 * 4000 / 11 and counts.max() < 1.2 * 4000 / 11


def test_pcm_goes_to_the_next_step_of_a_student_of_as_many_steps_as_phases():
    objective = _objective("pcm", phases=4)
    assert student_timesteps(1000, 50, 4) == [999, 759, 499, 259]
    for t, edge in [(999, 759), (779, 759), (759, 499), (519, 499), (499, 259), (279, 259), (259, 0), (19, 0)]:
        row = (t == UPPER).nonzero().flatten()
        assert objective.destination(row, torch.zeros(1, 2)).item() == edge
        assert objective.reach(row).item() == edge


def test_tdd_goes_to_the_steps_of_4_to_8_step_students_or_up_to_a_third_lower():
    objective = _objective("tdd")
    row = torch.tensor([49])
    nexts = [student_timesteps(1000, 50, steps)[1] for steps in range(4, 9)]
    exact = [objective.destination(row, torch.tensor([[(k + 0.5) / 5, 0.0]])).item() for k in range(5)]
    assert exact == nexts
    lowest = objective.destination(row, torch.tensor([[0.1, 1.0]])).item()
    assert lowest == int(0.7 * nexts[0])


@pytest.mark.parametrize("name", ["tcd", "pcm", "tdd"])
def test_a_jump_is_a_ddim_step_and_to_its_own_timestep_the_identity(name: str):
    objective = _objective(name)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    t = torch.tensor([999, 499, 19])
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in NOISE.level(t))
    prediction = Prediction((x - sigma * noise) / alpha, noise)
    torch.testing.assert_close(objective.jump(x, prediction, t, t), x, atol=1e-4, rtol=1e-4)
    scheduler = DDIMScheduler(**SCHEDULE | {"timestep_spacing": "trailing", "prediction_type": "epsilon"})
    scheduler.set_timesteps(50)
    expected = scheduler.step(noise[:1], 999, x[:1]).prev_sample
    ours = objective.jump(x[:1], Prediction(prediction.x0[:1], noise[:1]), t[:1], torch.tensor([979]))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "gamma"), [("tcd", 0.3), ("tcd", 0.0), ("pcm", None)])
def test_a_step_of_an_objective_is_a_step_of_its_students_sampler(name: str, gamma: float | None):
    objective = _objective(name, **({} if gamma is None else {"gamma": gamma}))
    scheduler = TCDScheduler(**SCHEDULE | {"prediction_type": "epsilon"})
    scheduler.set_timesteps(4, original_inference_steps=50)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
    t, s = torch.tensor([999]), scheduler.timesteps[1:2]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    eta, seeded = objective.sampler.gamma, torch.Generator().manual_seed(5)
    expected = scheduler.step(output, 999, x, eta=eta, generator=seeded).prev_sample
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in NOISE.level(t))
    arrived = objective.step(x, Prediction((x - sigma * output) / alpha, output), t, s, noise)
    torch.testing.assert_close(arrived, expected, atol=1e-4, rtol=1e-4)


def test_a_step_of_lcm_leads_over_zero():
    scheduler = LCMScheduler(**SCHEDULE | {"prediction_type": "epsilon"})
    scheduler.set_timesteps(4, original_inference_steps=50)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
    t, s = torch.tensor([999]), scheduler.timesteps[1:2]
    expected = scheduler.step(output, 999, x, generator=torch.Generator().manual_seed(5)).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in NOISE.level(t))
    arrived = _objective("lcm").step(x, Prediction((x - sigma * output) / alpha, output), t, s, noise)
    torch.testing.assert_close(arrived, expected, atol=1e-4, rtol=1e-4)
