import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from lcmlora.bases.schedule import Schedule
from lcmlora.demo.pretrain import SCHEDULE
from lcmlora.diffusion import solver

NOISE = Schedule.variance_preserving(DDIMScheduler(**SCHEDULE).alphas_cumprod, "v_prediction")


def _state(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 4, 8, 8, generator=generator)


def test_the_grid_is_19_to_999_and_its_first_point_steps_to_zero():
    upper, lower = solver.ddim_grid(1000, 50)
    assert upper.tolist() == list(range(19, 1000, 20))
    assert lower.tolist() == [0, *range(19, 980, 20)]


def test_a_grid_that_does_not_divide_the_schedule_is_refused():
    with pytest.raises(ValueError, match="30 points of 1000"):
        solver.ddim_grid(1000, 30)


def test_the_boundary_scalings_equal_diffusers_and_are_the_identity_at_zero():
    scheduler = LCMScheduler()
    for t in (0, 1, 19, 999):
        c_skip, c_out = solver.boundary_scalings(torch.tensor([t]))
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(t)))
        assert c_skip.item() == pytest.approx(expected[0].item(), rel=1e-6)
        assert c_out.item() == pytest.approx(expected[1].item(), rel=1e-6)
    x, x0 = _state()
    assert torch.equal(solver.consistency(x, x0, torch.zeros(4, dtype=torch.long)), x)


def test_guidance_w_is_a_pipelines_guidance_scale_minus_one():
    c, u = _state()
    pipelines = u + 8.5 * (c - u)
    torch.testing.assert_close(solver.guide(c, u, torch.full((4,), 7.5)), pipelines)


def test_loss_weights_follow_the_signal_to_noise_ratio_and_have_mean_one():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    t, _ = solver.ddim_grid(1000, 20)
    weights = solver.loss_weights(NOISE, t, "snr+1")
    snr = compute_snr(DDPMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "set_alpha_to_one"}), t)
    torch.testing.assert_close(weights / weights[-1], (snr + 1) / (snr[-1] + 1), rtol=1e-4, atol=0)
    assert weights.mean().item() == pytest.approx(1)
    assert solver.loss_weights(NOISE, t, "uniform").tolist() == [1] * 20
    with pytest.raises(ValueError, match="min-snr"):
        solver.loss_weights(NOISE, t, "min-snr")
