"""Training steps that start from states of teacher rollouts or of student rollouts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.config import Encode, Rollouts
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.prepare import prepare_pictures
from lcmlora.diffusion import solver
from lcmlora.diffusion.objectives import pseudo_huber
from lcmlora.distillation.loss import Distillation, sample_stream
from lcmlora.errors import UserError
from tests.data.conftest import data_in
from tests.support.distillation import CPU, SETTINGS, Recorder, draw_batch, load_parts, run_distill


@pytest.fixture(scope="module")
def drawn(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """The latents of sixteen prompts, with the states of the teacher rollouts."""
    root = tmp_path_factory.mktemp("drawn")
    (root / "prompts.txt").write_text("".join(f"subject {n}\n" for n in range(16)))
    data = data_in(root / "prompts.txt", source="prompts", validation=0, test=0.01)
    prepare_pictures(data, 1, root / "list")
    rollouts = Rollouts(steps=50, w=5.0, states=True)
    encode_latents(load_parts(base_folder, "network", "text"), data, Encode(batch=16, rollouts=rollouts), root / "list",
           root / "scratch", root / "latents")  # fmt: skip
    return LatentCache(root / "latents")


def _forwards(base: bases.LoadedBase) -> list[tuple[int, bool]]:
    """Returns a list that fills with the number of rows of each forward, and whether the adapter is on."""
    seen: list[tuple[int, bool]] = []
    layer = next(module for _, module in lora._layers(base.network))
    base.network.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), not layer.disable_adapters)))
    return seen


def test_on_the_teachers_own_states_a_step_takes_the_two_forwards_of_the_student(
    base: bases.LoadedBase, drawn: LatentCache
):
    settings = SETTINGS.model_copy(update={"trajectory": 1.0})
    for parameter in lora.inject(base.network, 4, 4, 0).values():
        parameter.data.normal_(std=0.1)
    distillation = Distillation(base, drawn.unconditional(), settings)
    batch, seen = draw_batch(drawn, settings), _forwards(base)
    losses = distillation.losses(batch)
    assert seen == [(4, True), (4, True)]
    rows = sample_stream(drawn, torch.arange(len(drawn)), settings, CPU).rows(range(4))
    teacher, (x, x_prev) = distillation.teacher, drawn.states(rows, batch.index)
    t, t_prev, w = teacher.t[batch.index], teacher.t_prev[batch.index], torch.full((4,), 5.0)
    torch.testing.assert_close(teacher.step(x, t, t_prev, w, batch.conditioning), x_prev, atol=5e-3, rtol=5e-3)
    online, aim = (
        solver.consistency(at, distillation.student(at, time, batch.conditioning).x0, time)
        for at, time in ((x, t), (x_prev, t_prev))
    )
    torch.testing.assert_close(losses, pseudo_huber(online, aim, SETTINGS.huber_c), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "objective", ["tcd", *(pytest.param(o, marks=pytest.mark.slow) for o in ("lcm", "pcm", "tdd"))]
)
def test_every_objective_learns_from_trajectories_and_from_its_own_runs(
    base_folder: Path, drawn: LatentCache, tmp_path: Path, objective: str
):
    logger = Recorder()
    changes = {"objective": objective, "steps": 40, "batch": 8, "lr": 3e-3, "log_every": 10}
    changes |= {"trajectory": 0.5, "rollout": 0.25}
    facts = run_distill(
        load_parts(base_folder, "network"), drawn, tmp_path, SETTINGS.model_copy(update=changes), logger
    )
    assert logger.losses[-1] < 0.95 * logger.losses[0]
    assert facts.distill.plain()["trajectory"] == 0.5


def test_a_student_rollout_leads_to_the_timestep_of_the_step(base: bases.LoadedBase, cache: LatentCache):
    settings = SETTINGS.model_copy(update={"rollout": 1.0, "objective": "tcd"})
    for parameter in lora.inject(base.network, 4, 4, 0).values():
        parameter.data.normal_(std=0.1)
    distillation = Distillation(base, cache.unconditional(), settings)
    seen = _forwards(base)
    for step, way in ((0, 1), (1, 2)):
        seen.clear()
        batch = draw_batch(cache, settings, step)
        batch.index[0] = batch.stops[:, 0] = 49  # from where there is no way to go
        distillation.losses(batch).mean().backward()
        assert seen == [(4, True)] * way + [(8, False), (4, True), (4, True)]
        x = distillation._student_rollout(batch)
        assert torch.equal(x[0], batch.noise[0]) and not x.requires_grad
        assert not torch.allclose(x[1:], distillation.noisy(batch, batch.index)[1:], atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 20}, "encode.rollouts.steps: 50 is not distill.grid, 20"),
        ({"w_min": 6.0}, "encode.rollouts.w: 5 is not within distill.w_min 6 and w_max 7.5"),
    ],
)
def test_trajectories_of_another_grid_or_guidance_are_refused(
    base_folder: Path, drawn: LatentCache, tmp_path: Path, changes: dict[str, Any], message: str
):
    settings = SETTINGS.model_copy(update={"trajectory": 0.5} | changes)
    with pytest.raises(UserError, match=message):
        run_distill(load_parts(base_folder, "network"), drawn, tmp_path, settings)


def test_pictures_have_no_trajectories(base_folder: Path, cache: LatentCache, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"distill.trajectory: 0.5 needs data.source: prompts, and encode.rollouts.states"
    ):
        run_distill(
            load_parts(base_folder, "network"), cache, tmp_path, SETTINGS.model_copy(update={"trajectory": 0.5})
        )
