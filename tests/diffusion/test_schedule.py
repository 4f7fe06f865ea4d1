import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from lcmlora.demo.pretrain import SCHEDULE
from lcmlora.diffusion import schedule

TYPES = ("epsilon", "v_prediction", "sample")
CUMPROD = DDIMScheduler(**SCHEDULE).alphas_cumprod


def _state(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 4, 8, 8, generator=generator)


def test_the_grid_is_19_to_999_and_its_first_point_steps_to_zero():
    upper, lower = schedule.ddim_grid(1000, 50)
    assert upper.tolist() == list(range(19, 1000, 20))
    assert lower.tolist() == [0, *range(19, 980, 20)]


def test_a_grid_that_does_not_divide_the_schedule_is_refused():
    with pytest.raises(ValueError, match="30 points of 1000"):
        schedule.ddim_grid(1000, 30)


@pytest.mark.parametrize("kind", TYPES)
def test_x0_and_noise_are_recovered_from_each_prediction_type(kind: str):
    x0, noise = _state()
    alpha, sigma = schedule.alpha_sigma(CUMPROD, torch.tensor([0, 19, 500, 999]))
    x = schedule.add_noise(x0, noise, alpha, sigma)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    output = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[kind]
    torch.testing.assert_close(schedule.predicted_x0(output, x, alpha, sigma, kind), x0, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(schedule.predicted_noise(output, x, alpha, sigma, kind), noise, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_a_ddim_step_equals_diffusers_at_all_50_timesteps(kind: str, to_one: bool):
    x, output = _state()
    options = {"prediction_type": kind, "timestep_spacing": "trailing", "set_alpha_to_one": to_one}
    scheduler = DDIMScheduler(**SCHEDULE | options)
    scheduler.set_timesteps(50)
    upper, lower = schedule.ddim_grid(1000, 50)
    assert scheduler.timesteps.tolist() == upper.flip(0).tolist()
    for t, t_prev in zip(upper, lower, strict=True):
        alpha, sigma = schedule.alpha_sigma(CUMPROD, t.view(1))
        x0 = schedule.predicted_x0(output, x, alpha, sigma, kind)
        noise = schedule.predicted_noise(output, x, alpha, sigma, kind)
        # The papers end at alpha_0; to one is the clean picture.
        level = schedule.alpha_sigma(CUMPROD, t_prev.view(1))
        level = (torch.ones(1), torch.zeros(1)) if to_one and t == 19 else level
        ours = schedule.ddim_step(x0, noise, *level)
        assert (ours - scheduler.step(output, int(t), x).prev_sample).abs().max() <= 1e-5


def test_the_boundary_scalings_equal_diffusers_and_are_the_identity_at_zero():
    scheduler = LCMScheduler()
    for t in (0, 1, 19, 999):
        c_skip, c_out = schedule.boundary_scalings(torch.tensor([t]))
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(t)))
        assert c_skip.item() == pytest.approx(expected[0].item(), rel=1e-6)
        assert c_out.item() == pytest.approx(expected[1].item(), rel=1e-6)
    x, x0 = _state()
    assert torch.equal(schedule.consistency(x, x0, torch.zeros(4, dtype=torch.long)), x)


def test_guidance_w_is_a_pipelines_guidance_scale_minus_one():
    c, u = _state()
    pipelines = u + 8.5 * (c - u)
    torch.testing.assert_close(schedule.guide(c, u, torch.full((4,), 7.5)), pipelines)


def test_loss_weights_follow_the_signal_to_noise_ratio_and_have_mean_one():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    t, _ = schedule.ddim_grid(1000, 20)
    weights = schedule.loss_weights(CUMPROD, t, "snr+1")
    snr = compute_snr(DDPMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "set_alpha_to_one"}), t)
    torch.testing.assert_close(weights / weights[-1], (snr + 1) / (snr[-1] + 1), rtol=1e-4, atol=0)
    assert weights.mean().item() == pytest.approx(1)
    assert schedule.loss_weights(CUMPROD, t, "uniform").tolist() == [1] * 20
    with pytest.raises(ValueError, match="min-snr"):
        schedule.loss_weights(CUMPROD, t, "min-snr")


def test_an_unknown_prediction_type_is_refused_by_name():
    x, output = _state()
    alpha, sigma = schedule.alpha_sigma(CUMPROD, torch.tensor([5] * 4))
    for convert in (schedule.predicted_x0, schedule.predicted_noise):
        with pytest.raises(ValueError, match="'flow'"):
            convert(output, x, alpha, sigma, "flow")
