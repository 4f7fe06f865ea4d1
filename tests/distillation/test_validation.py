import pytest
import torch
from diffusers import DDIMScheduler

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.loss import Distillation
from lcmlora.distillation.validation import Validation
from lcmlora.errors import UserError
from tests.support.distillation import SETTINGS

VALIDATION_ROWS = torch.tensor([0, 3])


def _validation(base: LoadedBase, cache: LatentCache, **changes: object) -> tuple[Distillation, Validation]:
    settings = SETTINGS.model_copy(update={"w_min": 3.0, "w_max": 5.0} | changes)
    distillation = Distillation(base, cache.unconditional(), settings)
    return distillation, Validation(distillation, cache, VALIDATION_ROWS, settings, 2, base.decode)


@pytest.mark.parametrize(("objective", "ends"), [("lcm", [0] * 4), ("pcm", [759, 499, 259, 0])])
def test_the_targets_are_where_the_guided_ddim_solver_ends(
    base: LoadedBase, cache: LatentCache, objective: str, ends: list[int]
):
    lora.inject(base.network, 4, 4, 0)
    _, validation = _validation(base, cache, objective=objective)
    assert [jump.s[0].item() for jump in validation._jumps] == ends
    scheduler = DDIMScheduler.from_config(base.scheduler_config, timestep_spacing="trailing", set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    empty = {k: v.expand(2, *v.shape[1:]) for k, v in cache.unconditional().items()}
    for jump, start in zip(validation._jumps, (999, 759, 499, 259), strict=True):
        x = jump.x
        with torch.no_grad():
            for t in [t for t in scheduler.timesteps.tolist() if jump.s[0] < t <= start]:
                time = torch.full((2,), t)
                c, u = base.predict(x, time, jump.batch.conditioning), base.predict(x, time, empty)
                x = scheduler.step(u + 5.0 * (c - u), t, x).prev_sample  # w = 4, the middle of its range
        # The papers' grid ends at alpha_0, as `set_alpha_to_one: false` does.
        torch.testing.assert_close(jump.target, x, atol=5e-3, rtol=1e-3)


def test_the_figure_is_the_same_each_time_and_grows_as_the_student_leaves_the_teacher(
    base: LoadedBase, cache: LatentCache
):
    parameters = lora.inject(base.network, 4, 4, 0)
    _, validation = _validation(base, cache)
    before = validation.loss()
    assert validation.loss() == before > 0
    for parameter in parameters.values():
        parameter.data.normal_(std=0.5)
    assert validation.loss() > 1.5 * before


def test_the_pictures_are_the_live_students(base: LoadedBase, cache: LatentCache):
    parameters = lora.inject(base.network, 4, 4, 0)
    _, validation = _validation(base, cache)
    before = validation.pictures()
    assert before is not None and before.size == (2 * 16, 16)
    assert before.tobytes() == validation.pictures().tobytes()
    for parameter in parameters.values():
        parameter.data.normal_(std=0.5)
    assert before.tobytes() != validation.pictures().tobytes()


def test_a_loss_that_is_not_finite_is_an_error(base: LoadedBase, cache: LatentCache):
    parameters = lora.inject(base.network, 4, 4, 0)
    _, validation = _validation(base, cache)
    next(iter(parameters.values())).data.fill_(float("nan"))
    with pytest.raises(UserError, match="the validation loss is not finite"):
        validation.loss()
