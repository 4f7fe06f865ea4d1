import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.adapters.metadata import Distilled
from lcmlora.bases.schedule import add_noise
from lcmlora.config import Base
from lcmlora.data.latents import texts
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion import solver
from lcmlora.diffusion.objectives import pseudo_huber
from lcmlora.diffusion.teacher import Teacher
from lcmlora.distillation.loss import Distillation
from lcmlora.errors import UserError
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training.loop import NullLogger
from lcmlora.training.optimization import Optimization
from tests.conftest import make_latents
from tests.support.distillation import CPU, SETTINGS, Recorder, draw_batch, load_parts, run_distill
from tests.support.miniature import RESOLUTION


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def test_the_teacher_takes_one_guided_ddim_step_of_the_base_alone(base: bases.LoadedBase, cache: LatentCache):
    from diffusers import DDIMScheduler

    teacher = Teacher(base, cache.unconditional(), SETTINGS.grid)
    parameters = lora.inject(base.network, 4, 4, 0)
    for parameter in parameters.values():
        parameter.data.normal_()  # an adapter that must have no effect
    batch = draw_batch(cache)
    t, t_prev = teacher.t[batch.index], teacher.t_prev[batch.index]
    x_prev = teacher.step(batch.noise, t, t_prev, batch.w, batch.conditioning)

    scheduler = DDIMScheduler.from_config(base.scheduler_config, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    empty = {k: v.expand(1, *v.shape[1:]) for k, v in cache.unconditional().items()}
    with torch.no_grad(), lora.disabled(base.network):
        for i in range(SETTINGS.batch):
            x, one = batch.noise[i : i + 1], {k: v[i : i + 1] for k, v in batch.conditioning.items()}
            c, u = base.predict(x, t[i : i + 1], one), base.predict(x, t[i : i + 1], empty)
            guided = u + (batch.w[i] + 1) * (c - u)
            if t[i] == 19:
                continue  # diffusers ends at its final alpha, the papers at alpha_0: checked by the algebra's own test
            expected = scheduler.step(guided, t[i].item(), x).prev_sample
            torch.testing.assert_close(x_prev[i : i + 1], expected, atol=2e-4, rtol=1e-3)


def test_batched_guidance_equals_two_passes(base: bases.LoadedBase, cache: LatentCache):
    teacher, batch = Teacher(base, cache.unconditional(), SETTINGS.grid), draw_batch(cache)
    empty = {k: v.expand_as(batch.conditioning[k]) for k, v in cache.unconditional().items()}
    t, t_prev = teacher.t[batch.index], teacher.t_prev[batch.index]
    with torch.no_grad():
        c, u = base.predict(batch.noise, t, batch.conditioning), base.predict(batch.noise, t, empty)
    guided = solver.guide(c, u, batch.w)
    expected = base.schedule.state(*base.schedule.prediction(guided, batch.noise, t), t_prev)
    x_prev = teacher.step(batch.noise, t, t_prev, batch.w, batch.conditioning)
    assert ((x_prev - expected).abs() / expected.abs().clamp(min=1)).max() <= 1e-5


@pytest.mark.parametrize("weighting", ["uniform", "snr+1"])
def test_the_loss_is_algorithm_1_of_the_paper(base: bases.LoadedBase, cache: LatentCache, weighting: str):
    """Computed a second time, sample by sample, from arXiv 2310.04378."""
    distillation = Distillation(base, cache.unconditional(), SETTINGS.model_copy(update={"weighting": weighting}))
    teacher = distillation.teacher
    for parameter in lora.inject(base.network, 4, 4, 0).values():
        parameter.data.normal_(std=0.1)
    batch = draw_batch(cache, step=1)
    losses = distillation.losses(batch)

    cumprod, expected = DDIMScheduler.from_config(base.scheduler_config).alphas_cumprod, []
    t, t_prev = teacher.t[batch.index], teacher.t_prev[batch.index]
    x = add_noise(batch.z, batch.noise, cumprod[t].sqrt(), (1 - cumprod[t]).sqrt())
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
            weight = distillation.weight[teacher.t == t[i]].item()
            expected.append(((d**2 + 1e-6).sqrt() - 1e-3).mean() * weight)
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_captions_kept_as_token_ids_train_alike(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = make_latents(base_folder, tmp_path / "whole")
    monkeypatch.setattr(texts, "_MB", 1)
    tokens = make_latents(base_folder, tmp_path / "tokens")
    assert tokens.tokenized and not whole.tokenized
    losses = []
    for number, cache in enumerate((whole, tokens)):
        base = load_parts(base_folder, "network", "text")
        cache.embed = base.encode_tokens
        logger = Recorder()
        run_distill(base, cache, tmp_path / str(number), SETTINGS.model_copy(update={"empty_prompts": 0.3}), logger)
        losses.append(torch.tensor(logger.losses))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-3)


def test_gradients_reach_the_adapter_and_nothing_else(base: bases.LoadedBase, cache: LatentCache):
    parameters = lora.inject(base.network, 4, 4, 0)
    Distillation(base, cache.unconditional(), SETTINGS).losses(draw_batch(cache)).mean().backward()
    with_gradient = {n for n, p in base.network.named_parameters() if p.grad is not None}
    assert with_gradient == set(parameters)
    assert all(p.grad.abs().sum() > 0 for n, p in parameters.items() if ".lora_B." in n)


def test_a_run_writes_an_adapter_its_facts_and_a_probe(base_folder: Path, cache: LatentCache, tmp_path: Path):
    logger = Recorder()
    base = load_parts(base_folder, "network")
    facts = run_distill(base, cache, tmp_path, logger=logger)
    out = tmp_path / "adapter"
    assert {p.name for p in out.iterdir()} == {
        lora.WEIGHTS, "scheduler_config.json", "config.json", "probe.safetensors",
    }  # fmt: skip
    assert logger.steps == [2, 4, 6]
    assert facts == Distilled.read(out / "config.json")
    assert facts.adapted_layers * 2 == len(load_file(out / lora.WEIGHTS))
    assert facts.final_loss == logger.losses[-1]

    probe = load_file(out / "probe.safetensors")
    fresh = load_parts(base_folder, "network")
    conditioning = {"encoder_hidden_states": probe["encoder_hidden_states"]}
    with torch.no_grad():
        alone = fresh.predict(probe["latents"], probe["timesteps"], conditioning)
        lora.load(fresh.network, out / lora.WEIGHTS)
        student = fresh.predict(probe["latents"], probe["timesteps"], conditioning)
    torch.testing.assert_close(alone, probe["base"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(student, probe["student"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(student, alone, atol=1e-3)


def test_the_loss_falls(base_folder: Path, cache: LatentCache, tmp_path: Path):
    logger = Recorder()
    settings = SETTINGS.model_copy(update={"steps": 40, "batch": 8, "lr": 3e-3, "log_every": 10})
    run_distill(load_parts(base_folder, "network"), cache, tmp_path, settings, logger)
    assert logger.losses[-1] < 0.9 * logger.losses[0]


def test_the_best_weights_by_validation_are_saved_and_config_json_says_which(
    base_folder: Path, cache: LatentCache, tmp_path: Path
):
    base = load_parts(base_folder, "network", "vae")
    logger = Recorder()
    # With this learning rate the student gets worse.
    settings = SETTINGS.model_copy(update={"lr": 0.03, "warmup": 0, "cooldown": 0.0, "ema": 0.0, "validate_every": 1})
    facts = run_distill(base, cache, tmp_path, settings, logger, decode=base.decode)
    best = facts.validation.best_step
    assert logger.validation == {int(step): loss for step, loss in facts.validation.loss.items()}
    assert logger.validation[best] == min(logger.validation.values()) < logger.validation[6]
    assert {step: picture.size for step, picture in logger.pictures.items()} == dict.fromkeys(range(1, 7), (16, 16))

    settings = settings.model_copy(update={"steps": best})
    run_distill(load_parts(base_folder, "network"), cache, tmp_path / "short", settings)
    weights = [load_file(folder / "adapter" / lora.WEIGHTS) for folder in (tmp_path, tmp_path / "short")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=0, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"checkpointing": "full"},
        pytest.param({"checkpointing": "selective"}, marks=pytest.mark.slow),
    ],
    ids=["accumulation", "full", "selective"],
)
def test_memory_is_saved_without_changing_the_adapter(
    base_folder: Path, cache: LatentCache, tmp_path: Path, changes: dict[str, Any]
):
    slow = SETTINGS.model_copy(update={"lr": 1e-4})  # Adam turns rounding of a gradient into whole steps
    for name, settings in (("plain", slow), ("saving", slow.model_copy(update=changes))):
        run_distill(load_parts(base_folder, "network"), cache, tmp_path / name, settings)
    plain, saving = (load_file(tmp_path / name / "adapter" / lora.WEIGHTS) for name in ("plain", "saving"))
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"]
)
def test_over_a_half_precision_base_the_adapter_is_trained_in_fp32_and_also_after_a_kill(
    base_folder: Path, cache: LatentCache, tmp_path: Path, dtype: torch.dtype
):
    def load() -> bases.LoadedBase:
        settings = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
        return bases.load("mini", settings, base_folder, device=CPU, dtype=dtype, parts=("network",))

    class Killer(NullLogger):
        def log(self, metrics: dict[str, float], step: int) -> None:
            if step == 4:
                raise Killed

    run_distill(load(), cache, tmp_path / "whole")
    with pytest.raises(Killed):
        run_distill(load(), cache, tmp_path / "killed", logger=Killer())
    state = torch.load(tmp_path / "killed/scratch/checkpoint.pt", weights_only=True)["optimization"]
    moments = state["optimizer"]["state"][0]
    assert {t.dtype for t in (state["weights"], state["average"], moments["exp_avg"])} == {torch.float32}
    base = load()
    run_distill(base, cache, tmp_path / "killed")
    assert base.network.conv_in.weight.dtype == dtype
    assert {p.dtype for n, p in base.network.named_parameters() if ".lora_" in n} == {torch.float32}
    files = [load_file(tmp_path / name / "adapter" / lora.WEIGHTS) for name in ("whole", "killed")]
    assert {t.dtype for t in files[0].values()} == {torch.float16}  # as the published adapters are
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert any(t.abs().max() > 1e-3 for n, t in files[0].items() if ".lora_B." in n)


@pytest.mark.slow
def test_a_compiled_run_makes_the_adapter_of_an_eager_one(base_folder: Path, cache: LatentCache, tmp_path: Path):
    slow = SETTINGS.model_copy(update={"lr": 1e-4})
    for name, settings in (("eager", slow), ("compiled", slow.model_copy(update={"compile": True}))):
        run_distill(load_parts(base_folder, "network"), cache, tmp_path / name, settings)
    torch._dynamo.reset()
    eager, compiled = (load_file(tmp_path / name / "adapter" / lora.WEIGHTS) for name in ("eager", "compiled"))
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=2e-5, rtol=0)


# In an ordinary test run the golden outcomes of the stage check all four.
@pytest.mark.parametrize(
    "objective", ["tcd", *(pytest.param(o, marks=pytest.mark.slow) for o in ("lcm", "pcm", "tdd"))]
)
def test_every_objective_learns_and_names_its_scheduler(
    base_folder: Path, cache: LatentCache, tmp_path: Path, objective: str
):
    logger = Recorder()
    changes = {"objective": objective, "steps": 40, "batch": 8, "lr": 3e-3, "log_every": 10, "empty_prompts": 0.2}
    facts = run_distill(
        load_parts(base_folder, "network"), cache, tmp_path, SETTINGS.model_copy(update=changes), logger
    )
    assert logger.losses[-1] < 0.95 * logger.losses[0]
    scheduler = json.loads((tmp_path / "adapter/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == facts.sampler.scheduler
    assert scheduler["original_inference_steps"] == facts.sampler.grid == 50
    assert facts.sampler.gamma == {"lcm": None, "pcm": 0.0, "tcd": 0.3, "tdd": 0.3}[objective]


def test_the_target_has_the_averaged_weights_where_that_is_asked_for(base: bases.LoadedBase, cache: LatentCache):
    parameters = lora.inject(base.network, 4, 4, 0)
    LoraForwards().install(base.network)
    optimization = Optimization(parameters, SETTINGS)
    averaging = SETTINGS.model_copy(update={"target": "ema"})
    distillation = Distillation(base, cache.unconditional(), averaging)
    for parameter in parameters.values():
        parameter.data.normal_(std=0.1)  # the average is still what it was at the start: without effect
    batch = draw_batch(cache)
    ema = distillation.losses(batch, optimization)
    t, t_prev = distillation.teacher.t[batch.index], distillation.teacher.t_prev[batch.index]
    x = distillation.noisy(batch, batch.index)
    x_prev = distillation.teacher.step(x, t, t_prev, batch.w, batch.conditioning)
    with torch.no_grad():
        online = solver.consistency(x, distillation.student(x, t, batch.conditioning).x0, t)
        with lora.disabled(base.network):
            aim = solver.consistency(x_prev, distillation.student(x_prev, t_prev, batch.conditioning).x0, t_prev)
    torch.testing.assert_close(ema, pseudo_huber(online, aim, SETTINGS.huber_c), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ema, distillation.losses(batch), rtol=1e-2)
    ema.mean().backward()  # the student's forward was made with the live weights, and still is there


def test_the_target_is_computed_with_the_adapter_on(base: bases.LoadedBase, cache: LatentCache):
    """SimpleTuner computes it with the adapter off: that is the teacher."""
    parameters = lora.inject(base.network, 4, 4, 0)
    distillation = Distillation(base, cache.unconditional(), SETTINGS)
    for parameter in parameters.values():
        parameter.data.normal_(std=0.1)
    adapter_off: list[bool] = []
    layer = next(module for _, module in lora._layers(base.network))
    layer.register_forward_pre_hook(lambda module, _: adapter_off.append(module.disable_adapters))
    distillation.losses(draw_batch(cache))
    assert adapter_off == [True, False, False]  # teacher, target, student


def test_the_schedule_is_fp32_under_a_half_precision_base(base_folder: Path, cache: LatentCache):
    """add_noise in bf16 makes sigma 4.8 % wrong at t = 19."""
    settings = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    base = bases.load("mini", settings, base_folder, device=CPU, dtype=torch.bfloat16, parts=("network",))
    lora.inject(base.network, 4, 4, 0)
    LoraForwards().install(base.network)
    distillation = Distillation(base, cache.unconditional(), SETTINGS)
    batch = draw_batch(cache)
    batch.index.zero_()
    cumprod = DDIMScheduler.from_config(base.scheduler_config).alphas_cumprod[19]
    alpha, sigma = cumprod.sqrt(), (1 - cumprod).sqrt()
    x = distillation.noisy(batch, batch.index)
    torch.testing.assert_close(x, alpha * batch.z + sigma * batch.noise, atol=1e-6, rtol=1e-6)
    prediction = distillation.student(x, distillation.teacher.t[batch.index], batch.conditioning)
    assert {x.dtype, prediction.x0.dtype, prediction.noise.dtype, distillation.losses(batch).dtype} == {torch.float32}
    error = alpha * prediction.x0 + sigma * prediction.noise - x
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_killed_run_ends_with_the_same_bytes_as_an_undisturbed_one(
    base_folder: Path, cache: LatentCache, tmp_path: Path, at: int
):
    class Killer(NullLogger):
        def log(self, metrics: dict[str, float], step: int) -> None:
            if step == at + 2:
                raise Killed

    run_distill(load_parts(base_folder, "network"), cache, tmp_path / "whole")
    with pytest.raises(Killed):
        run_distill(load_parts(base_folder, "network"), cache, tmp_path / "killed", logger=Killer())
    assert not (tmp_path / "killed" / "adapter").exists()
    resumed = Recorder()
    run_distill(load_parts(base_folder, "network"), cache, tmp_path / "killed", logger=resumed)
    assert resumed.steps[0] == at + 2
    for name in (lora.WEIGHTS, "config.json", "probe.safetensors"):
        assert (tmp_path / "whole/adapter" / name).read_bytes() == (tmp_path / "killed/adapter" / name).read_bytes()


def test_a_cache_of_another_base_and_too_small_a_cache_are_refused(
    base_folder: Path, cache: LatentCache, tmp_path: Path
):
    base = load_parts(base_folder, "network")
    with pytest.raises(UserError, match=r"distill\.batch: 64 is more than the"):
        run_distill(base, cache, tmp_path, SETTINGS.model_copy(update={"batch": 64}))
    base.resolution *= 2
    with pytest.raises(UserError, match=r"the latent cache holds \(4, 8, 8\), mini needs \(4, 16, 16\)"):
        run_distill(base, cache, tmp_path)


def test_ten_losses_in_a_row_that_are_not_finite_stop_the_run_with_the_pictures(
    base_folder: Path, cache: LatentCache, tmp_path: Path
):
    base = load_parts(base_folder, "network")
    settings = SETTINGS.model_copy(update={"steps": 30, "log_every": 4, "checkpoint_every": 30, "validate_every": 30})
    broken = _Breaking(cache, at=range(3, 30))
    with pytest.raises(UserError, match=r"step 13: the loss is not finite, for the 10th .* so for \d\.png$"):
        run_distill(base, broken, tmp_path, settings)
    assert not (tmp_path / "adapter").exists()


def test_a_step_whose_loss_is_not_finite_is_skipped_and_reported(
    base_folder: Path, cache: LatentCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    logger = Recorder()
    run_distill(load_parts(base_folder, "network"), _Breaking(cache, at=range(3, 4)), tmp_path, logger=logger)
    assert logger.skipped == [0, 1, 0]
    assert "of the steps 3 to 4 1 were skipped" in capsys.readouterr().err
    weights = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    assert all(value.isfinite().all() for value in weights.values())
    assert any(value.abs().sum() > 0 for name, value in weights.items() if ".lora_B." in name)


class _Breaking(LatentCache):
    """The cache, one of whose latents is not finite whenever a batch of these steps is read."""

    def __init__(self, cache: LatentCache, at: range) -> None:
        vars(self).update(vars(cache))
        self._steps, self._read = at, 0

    def latents(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = super().latents(rows)
        if len(rows) == SETTINGS.batch:  # neither probe nor validation
            if self._read in self._steps:
                mean[1, 0, 0, 0] = float("nan")
            self._read += 1
        return mean, logvar
