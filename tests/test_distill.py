import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcmlora import bases, config, diffusion, lora, objectives
from lcmlora.config import Base, Distill
from lcmlora.data import cache as latent_cache
from lcmlora.data.cache import LatentCache
from lcmlora.data.prepare import prepare
from lcmlora.distill import Batches, NullLogger, Optimization, Teacher, distill, loss_of
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture
from tests.miniature import RESOLUTION

CPU = torch.device("cpu")
SETTINGS = Distill(
    objective="lcm",
    seed=3,
    steps=6,
    batch=4,
    lr=1e-2,
    warmup=2,
    cooldown=0.5,
    weight_decay=0.0,
    max_grad_norm=1.0,
    ema=0.9,
    rank=4,
    alpha=8,
    w_min=3.0,
    w_max=7.5,
    grid=50,
    huber_c=1e-3,
    weighting="uniform",
    checkpoint_every=2,
    log_every=2,
)


def _load(folder: Path, *parts: str) -> bases.LoadedBase:
    settings = Base(source=str(folder), resolution=RESOLUTION, license="apache-2.0")
    return bases.load("mini", settings, folder, device=CPU, parts=parts)


@pytest.fixture(scope="module")
def cache(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    work = tmp_path_factory.mktemp("distill")
    for number in range(10):
        add(work / "in", f"{number}.png", f"subject {number}", picture(number))
    data = data_in(work / "in", min_side=16, validation=0.2)
    prepare(data, 4, work / "pictures")
    base = _load(base_folder, "vae", "text")
    latent_cache.encode(base, data, config.Encode(batch=4), work / "pictures", work / "scratch", work / "latents")
    return LatentCache(work / "latents")


class Recorder(NullLogger):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append(step)
        self.losses.append(metrics["loss"])


def _run(base: bases.LoadedBase, cache: LatentCache, work: Path, settings: Distill = SETTINGS, logger: Any = None):
    (work / "scratch").mkdir(parents=True, exist_ok=True)
    return distill(
        base,
        cache,
        settings,
        work / "scratch",
        work / "adapter",
        identity={"source": "mini", "revision": None, "digest": "0"},
        run={"run_id": None},
        logger=logger or NullLogger(),
    )


def test_every_picture_is_seen_once_in_an_epoch(cache: LatentCache):
    settings = SETTINGS.model_copy(update={"batch": len(cache)})
    batches = Batches(cache, settings, CPU)
    for step in range(3):
        assert sorted(batches._rows(step).tolist()) == list(range(len(cache)))


def test_a_batch_depends_on_seed_and_step_alone(cache: LatentCache):
    forward = Batches(cache, SETTINGS, CPU)
    for step in range(5):
        forward.draw(step)
    one, two = forward.draw(5), Batches(cache, SETTINGS, CPU).draw(5)
    for name in ("z", "noise", "index", "w"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    other = Batches(cache, SETTINGS.model_copy(update={"seed": 4}), CPU).draw(5)
    assert not torch.equal(one.noise, other.noise)


def test_grid_points_are_uniform_and_guidance_stays_in_its_range(cache: LatentCache):
    settings = SETTINGS.model_copy(update={"batch": 100})
    batch = Batches(cache, settings, CPU).draw(0)
    assert torch.bincount(batch.index, minlength=50).tolist() == [2] * 50  # two strata each
    assert batch.w.min() >= 3.0 and batch.w.max() <= 7.5


def test_the_teacher_takes_one_guided_ddim_step_of_the_base_alone(base: bases.LoadedBase, cache: LatentCache):
    from diffusers import DDIMScheduler

    teacher = Teacher(base, cache.unconditional(), SETTINGS)
    parameters = lora.inject(base.unet, 4, 4, 0)
    for parameter in parameters.values():
        parameter.data.normal_()  # an adapter that must not be heard
    batch = Batches(cache, SETTINGS, CPU).draw(0)
    t, t_prev = teacher.t[batch.index], teacher.t_prev[batch.index]
    ours = teacher.step(batch.noise, t, t_prev, batch.w, batch.conditioning)

    scheduler = DDIMScheduler.from_config(base.scheduler_config, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    empty = {k: v.expand(1, *v.shape[1:]) for k, v in cache.unconditional().items()}
    with torch.no_grad(), lora.disabled(base.unet):
        for i in range(SETTINGS.batch):
            x, one = batch.noise[i : i + 1], {k: v[i : i + 1] for k, v in batch.conditioning.items()}
            c, u = base.predict(x, t[i : i + 1], one), base.predict(x, t[i : i + 1], empty)
            guided = u + (batch.w[i] + 1) * (c - u)
            if t[i] == 19:
                continue  # diffusers ends at its final alpha, the papers at alpha_0: checked by the algebra's own test
            expected = scheduler.step(guided, t[i].item(), x).prev_sample
            torch.testing.assert_close(ours[i : i + 1], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("weighting", ["uniform", "snr+1"])
def test_the_loss_is_algorithm_1_of_the_paper(base: bases.LoadedBase, cache: LatentCache, weighting: str):
    """Written out a second time, sample by sample, from arXiv 2310.04378."""
    teacher = Teacher(base, cache.unconditional(), SETTINGS.model_copy(update={"weighting": weighting}))
    for parameter in lora.inject(base.unet, 4, 4, 0).values():
        parameter.data.normal_(std=0.1)
    batch = Batches(cache, SETTINGS, CPU).draw(1)
    loss = loss_of(base, teacher, objectives.make(SETTINGS), batch)

    cumprod, expected = base.alphas_cumprod, []
    t, t_prev = teacher.t[batch.index], teacher.t_prev[batch.index]
    x = diffusion.add_noise(batch.z, batch.noise, cumprod[t].sqrt(), (1 - cumprod[t]).sqrt())
    x_prev = teacher.step(x, t, t_prev, batch.w, batch.conditioning)

    def f(latents: torch.Tensor, time: torch.Tensor, one: bases.Conditioning) -> torch.Tensor:
        alpha, sigma = cumprod[time].sqrt(), (1 - cumprod[time]).sqrt()
        x0 = (latents - sigma * base.predict(latents, time, one)) / alpha
        scaled = 10.0 * time.item()
        return 0.25 / (scaled**2 + 0.25) * latents + scaled / (scaled**2 + 0.25) ** 0.5 * x0

    with torch.no_grad():
        for i in range(SETTINGS.batch):
            one = {k: v[i : i + 1] for k, v in batch.conditioning.items()}
            d = f(x[i : i + 1], t[i : i + 1], one) - f(x_prev[i : i + 1], t_prev[i : i + 1], one)
            weight = teacher.weight[teacher.t == t[i]].item()
            expected.append(((d**2 + 1e-6).sqrt() - 1e-3).mean() * weight)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_gradients_reach_the_adapter_and_nothing_else(base: bases.LoadedBase, cache: LatentCache):
    parameters = lora.inject(base.unet, 4, 4, 0)
    loss_of(base, Teacher(base, cache.unconditional(), SETTINGS), objectives.make(SETTINGS),
            Batches(cache, SETTINGS, CPU).draw(0)).backward()  # fmt: skip
    with_gradient = {n for n, p in base.unet.named_parameters() if p.grad is not None}
    assert with_gradient == set(parameters)
    assert all(p.grad.abs().sum() > 0 for n, p in parameters.items() if ".lora_B." in n)


def _optimization(**changes: Any) -> tuple[torch.nn.Parameter, Optimization]:
    parameter = torch.nn.Parameter(torch.ones(3))
    return parameter, Optimization({"p": parameter}, SETTINGS.model_copy(update={"warmup": 0, "cooldown": 0} | changes))


def test_clipping_clips_as_torch_does():
    mine, optimization = _optimization()
    theirs = torch.nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([theirs], lr=SETTINGS.lr, weight_decay=0.0)
    for step, scale in enumerate((100.0, 0.1)):  # AdamW forgets one scale; two steps show the ratio
        mine.grad = torch.full((3,), scale)
        theirs.grad = torch.full((3,), scale)
        assert optimization.step(step).item() == pytest.approx(scale * 3**0.5)
        torch.nn.utils.clip_grad_norm_([theirs], SETTINGS.max_grad_norm)
        adamw.step()
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing():
    parameter, optimization = _optimization()
    parameter.grad = torch.tensor([1.0, float("nan"), 1.0])
    optimization.step(0)
    assert parameter.tolist() == [1.0, 1.0, 1.0]


def test_the_rate_warms_up_holds_and_cools_down():
    _, optimization = _optimization(warmup=2, cooldown=0.5, steps=8, lr=1.0)
    assert [optimization.rate(s) for s in range(8)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_run_writes_an_adapter_its_facts_and_a_probe(base_folder: Path, cache: LatentCache, tmp_path: Path):
    logger = Recorder()
    base = _load(base_folder, "unet")
    facts = _run(base, cache, tmp_path, logger=logger)
    out = tmp_path / "adapter"
    assert {p.name for p in out.iterdir()} == {
        lora.WEIGHTS, "scheduler_config.json", "config.json", "run.json", "probe.safetensors",
    }  # fmt: skip
    assert logger.steps == [2, 4, 6]
    assert facts == json.loads((out / "config.json").read_text())
    assert facts["adapted_layers"] * 2 == len(load_file(out / lora.WEIGHTS))
    assert facts["final_loss"] == logger.losses[-1]

    probe = load_file(out / "probe.safetensors")
    fresh = _load(base_folder, "unet")
    conditioning = {"encoder_hidden_states": probe["encoder_hidden_states"]}
    with torch.no_grad():
        alone = fresh.predict(probe["latents"], probe["timesteps"], conditioning)
        lora.load(fresh.unet, out / lora.WEIGHTS)
        student = fresh.predict(probe["latents"], probe["timesteps"], conditioning)
    torch.testing.assert_close(alone, probe["base"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(student, probe["student"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(student, alone, atol=1e-3)


def test_the_loss_falls(base_folder: Path, cache: LatentCache, tmp_path: Path):
    logger = Recorder()
    settings = SETTINGS.model_copy(update={"steps": 40, "batch": 8, "lr": 3e-3, "log_every": 10})
    _run(_load(base_folder, "unet"), cache, tmp_path, settings, logger)
    assert logger.losses[-1] < 0.9 * logger.losses[0]


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


@pytest.mark.parametrize("at", [2, 4])
def test_a_killed_run_ends_with_the_same_bytes_as_an_undisturbed_one(
    base_folder: Path, cache: LatentCache, tmp_path: Path, at: int
):
    class Killer(NullLogger):
        def log(self, metrics: dict[str, float], step: int) -> None:
            if step == at + 2:
                raise Killed

    _run(_load(base_folder, "unet"), cache, tmp_path / "whole")
    with pytest.raises(Killed):
        _run(_load(base_folder, "unet"), cache, tmp_path / "killed", logger=Killer())
    assert not (tmp_path / "killed" / "adapter").exists()
    resumed = Recorder()
    _run(_load(base_folder, "unet"), cache, tmp_path / "killed", logger=resumed)
    assert resumed.steps[0] == at + 2
    for name in (lora.WEIGHTS, "config.json", "probe.safetensors"):
        assert (tmp_path / "whole/adapter" / name).read_bytes() == (tmp_path / "killed/adapter" / name).read_bytes()


def test_a_cache_of_another_base_and_too_small_a_cache_are_refused(
    base_folder: Path, cache: LatentCache, tmp_path: Path
):
    base = _load(base_folder, "unet")
    with pytest.raises(UserError, match=r"distill\.batch: 64 is more than the"):
        _run(base, cache, tmp_path, SETTINGS.model_copy(update={"batch": 64}))
    base.resolution *= 2
    with pytest.raises(UserError, match=r"the latent cache holds \(4, 8, 8\), mini needs \(4, 16, 16\)"):
        _run(base, cache, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(base_folder: Path, cache: LatentCache, tmp_path: Path):
    base = _load(base_folder, "unet")
    base.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the loss is not finite"):
        _run(base, cache, tmp_path)
    assert not (tmp_path / "adapter").exists()
