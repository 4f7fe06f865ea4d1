"""Polish: distribution matching by a second adapter of the same layers on the same frozen base."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.memory import held_storages
from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.adapters.metadata import FACTS, Distilled, Sampler
from lcmlora.config import Base, Distill, Launch
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion import sampling, solver
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.distillation.matching import DistributionMatching
from lcmlora.distillation.polish import polish_adapter
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file
from lcmlora.parallel import launcher
from lcmlora.settings.training import Polish
from lcmlora.training.loop import NullLogger
from tests.support.distillation import CPU, SETTINGS, load_parts, run_distill
from tests.support.miniature import RESOLUTION

POLISH = Polish(steps=4, lr=1e-3, fake_lr=1e-2, fake_updates=2, head_start=1, w=1.0, student_steps=(1, 2))
POLISHED = SETTINGS.model_copy(update={"polish": POLISH, "validate_every": 2})


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def matching_of(base: bases.LoadedBase, cache: LatentCache, settings: Distill = POLISHED) -> DistributionMatching:
    student, random = add_adapter(base, settings), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student._parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    fake = student.second(settings)
    assert settings.polish is not None
    batches = sample_stream(cache, torch.arange(len(cache)), settings, CPU)
    distillation = Distillation(base, cache.unconditional(), settings)
    return DistributionMatching(distillation, student, fake, batches, settings.polish, settings.seed)


def judge_of(base: bases.LoadedBase, cache: LatentCache):
    """Judges by the distance of the student's latents from the latents of the cache."""
    conditioning = cache.conditioning(torch.arange(4))

    def judge(sampler: Sampler) -> Mapping[str, float]:
        noise = sampling.initial_noise(base.latent_shape, 5, range(4))
        drawn = sampling.sample_student(base, conditioning, noise, steps=2, seed=5, indices=range(4), sampler=sampler)
        return {"distance@2": float(drawn.square().mean())}

    return judge


def run_polish(
    folder: Path, cache: LatentCache, adapter: Path, work: Path, settings: Distill = POLISHED, logger=None, judge=None
) -> Distilled:
    base = load_parts(folder, "network")
    (work / "scratch").mkdir(parents=True, exist_ok=True)
    made = polish_adapter(
        base,
        cache,
        settings,
        adapter,
        work / "scratch",
        work / "adapter",
        identity={"source": "mini", "revision": None, "digest": "0"},
        logger=logger or NullLogger(),
        judge=judge or judge_of(base, cache),
    )
    assert made is not None
    return made


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, cache: LatentCache) -> Path:
    work = tmp_path_factory.mktemp("distilled")
    run_distill(load_parts(base_folder, "network"), cache, work)
    return work / "adapter"


def test_the_gradient_is_fake_less_teacher_over_the_distance_from_the_teacher(
    base: bases.LoadedBase, cache: LatentCache, monkeypatch: pytest.MonkeyPatch
):
    matching = matching_of(base, cache)
    with torch.no_grad():
        matching._fake._weights.mul_(1.5)
    batch = matching._batches.draw(0)
    draw = matching._draw(0, batch.sample_indices, batch.noise)
    rollout = matching._rollout(batch.conditioning, draw)
    pictures: list[Tensor] = []
    predict = matching._picture

    def followed(*args: object) -> Tensor:
        pictures.append(predict(*args))  # type: ignore[arg-type]
        pictures[-1].retain_grad()
        return pictures[-1]

    monkeypatch.setattr(matching, "_picture", followed)
    matching.matching(batch, draw, rollout).sum().backward()
    (picture,) = pictures
    assert torch.equal(picture, rollout.picture)

    schedule, (t, noise) = base.schedule, draw.compared
    with torch.no_grad():
        x = schedule.state(picture, noise, t)
        with lora.disabled(base.network):
            c = base.predict(x, t, batch.conditioning)
            empty = {k: v.expand_as(batch.conditioning[k]) for k, v in cache.unconditional().items()}
            u = base.predict(x, t, batch.conditioning | empty)
        teacher = schedule.prediction(u + (POLISH.w + 1) * (c - u), x, t).x0
        with matching._as_fake():
            fake = schedule.prediction(base.predict(x, t, batch.conditioning), x, t).x0
    scale = (picture - teacher).abs().flatten(1).mean(1).clamp(min=0.05).view(-1, 1, 1, 1)
    expected = (fake - teacher) / scale / picture[0].numel()
    assert picture.grad is not None
    torch.testing.assert_close(picture.grad, expected, atol=1e-6, rtol=1e-3)


def test_the_anchor_is_where_the_guided_teacher_arrives_from_the_same_noise(base: bases.LoadedBase, cache: LatentCache):
    polish = POLISH.model_copy(update={"anchor": 0.5, "anchor_steps": 3})
    matching = matching_of(base, cache, POLISHED.model_copy(update={"polish": polish}))
    batch, schedule = matching._batches.draw(0), base.schedule
    steps = list(zip(*(times.tolist() for times in solver.ddim_grid(1000, POLISHED.grid)), strict=True))[:-4:-1]
    empty = {k: v.expand_as(batch.conditioning[k]) for k, v in cache.unconditional().items()}
    x, everyone = batch.noise, torch.ones(len(batch.noise), dtype=torch.long)
    with torch.no_grad(), lora.disabled(base.network):
        for t, s in steps:
            c = base.predict(x, everyone * t, batch.conditioning)
            u = base.predict(x, everyone * t, batch.conditioning | empty)
            guided = solver.guide(c, u, batch.w)
            x = schedule.state(*schedule.prediction(guided, x, everyone * t), everyone * s)
    t, s = everyone * steps[0][0], everyone * steps[-1][1]
    prediction = schedule.prediction(base.predict(batch.noise, t, batch.conditioning), batch.noise, t)
    loss = matching.anchoring(batch, batch.noise)
    loss.sum().backward()
    # The error of the first step in latents without noise is that of its state, over how much of x0 is in it.
    alpha, sigma = schedule.level(t)
    alpha_s, sigma_s = schedule.level(s)
    share = (alpha_s - sigma_s / sigma * alpha).view(-1, 1, 1, 1)
    error = (schedule.state(*prediction, s) - x) / share
    torch.testing.assert_close(loss, error.square().flatten(1).mean(1), atol=1e-4, rtol=1e-3)
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in base.network.named_parameters() if "lora_B" in n
    )


def test_the_picture_of_the_last_step_is_what_the_sampler_draws(base: bases.LoadedBase, cache: LatentCache):
    matching = matching_of(base, cache)
    batch = matching._batches.draw(0)
    noise = torch.randn(2, *batch.noise.shape, generator=torch.Generator().manual_seed(0))
    draw = matching._draw(0, batch.sample_indices, batch.noise)._replace(steps=2, at=1, noise=noise)
    drawn = sampling.sample_student(
        base,
        batch.conditioning,
        noise[0],
        steps=2,
        sampler=matching._distillation.objective.sampler,
        fresh=lambda step: noise[step],
    )
    torch.testing.assert_close(matching._rollout(batch.conditioning, draw).picture, drawn)


def test_student_and_fake_score_learn_apart_and_the_base_stays(base: bases.LoadedBase, cache: LatentCache):
    matching = matching_of(base, cache)
    student, fake = matching._student, matching._fake
    assert torch.equal(student._weights, fake._weights)
    frozen = {n: p.clone() for n, p in base.network.named_parameters() if ".lcm." not in n}
    before = student._weights.detach().clone()

    matching.before_step(0)
    assert torch.equal(student._weights, before)
    assert not torch.equal(fake._weights, before)
    assert all(p.grad is None for p in base.network.parameters())

    kept = fake._weights.detach().clone()
    for term in matching.parts(matching._batches.draw(0), student):
        student.backward(term.mean())
    student.step(0)
    assert not torch.equal(student._weights, before)
    assert torch.equal(fake._weights, kept)
    for name, parameter in base.network.named_parameters():
        if ".lcm." not in name:
            assert torch.equal(parameter, frozen[name]), name


def test_teacher_student_and_fake_score_are_one_base_in_memory(base_folder: Path, cache: LatentCache):
    """Of each adapter there are five sets of values: layers, weights, average and the optimizer's two moments."""
    settings = POLISHED.model_copy(update={"rank": 1})
    before = held_storages()
    base = load_parts(base_folder, "network")
    frozen = sum(parameter.nbytes for parameter in base.network.parameters())
    matching = matching_of(base, cache, settings)
    matching.before_step(0)
    for term in matching.parts(matching._batches.draw(0), matching._student):
        matching._student.backward(term.mean())
    matching._student.step(0)
    adapter = matching._student._weights.nbytes
    held = sum(bytes_ for storage, bytes_ in held_storages().items() if storage not in before)
    assert frozen + 8 * adapter <= held < 1.5 * frozen + 10 * adapter < 2 * frozen + 8 * adapter


def test_the_fake_score_comes_to_predict_the_students_pictures(base: bases.LoadedBase, cache: LatentCache):
    changes = {"fake_updates": 1, "head_start": 0}
    changed = {"lr": 3e-3, "warmup": 0, "cooldown": 0.0, "polish": POLISH.model_copy(update=changes)}
    matching, losses = matching_of(base, cache, POLISHED.model_copy(update=changed)), []
    backward = matching._fake.backward

    def followed(loss: Tensor) -> None:
        losses.append(loss.item())
        backward(loss)

    matching._fake.backward = followed  # type: ignore[method-assign]
    for step in range(60):
        matching.before_step(step)
    assert sum(losses[-20:]) < 0.97 * sum(losses[:20])


def test_a_polish_writes_a_plain_lora_with_its_facts(
    base_folder: Path, cache: LatentCache, distilled: Path, tmp_path: Path
):
    made = run_polish(base_folder, cache, distilled, tmp_path)
    weights, start = load_file(tmp_path / "adapter" / lora.WEIGHTS), load_file(distilled / lora.WEIGHTS)
    assert weights.keys() == start.keys()
    assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in start.items()}
    assert made.polish is not None
    assert made.polish.of == sha256_file(distilled / lora.WEIGHTS)
    assert list(made.polish.distances) == ["0", "2", "4"]
    assert min(made.polish.distances.values()) == made.polish.distances[str(made.polish.best_step)]
    before = Distilled.read(distilled / FACTS)
    assert (made.steps, made.validation, made.sampler) == (before.steps, before.validation, before.sampler)
    assert Distilled.read(tmp_path / "adapter" / FACTS) == made


def test_the_start_is_kept_where_no_step_is_better(
    base_folder: Path, cache: LatentCache, distilled: Path, tmp_path: Path
):
    distances = iter((1.0, 1.5, 1.1))
    made = run_polish(base_folder, cache, distilled, tmp_path, judge=lambda sampler: {"distance@2": next(distances)})
    assert made.polish is not None
    assert made.polish.best_step == 0
    weights, start = load_file(tmp_path / "adapter" / lora.WEIGHTS), load_file(distilled / lora.WEIGHTS)
    for name, tensor in start.items():
        torch.testing.assert_close(weights[name], tensor, msg=name)


@pytest.mark.parametrize("changes", [{}, {"anchor": 0.1, "anchor_steps": 2, "consistency": 0.0}])
def test_a_killed_polish_ends_with_the_same_bytes_as_an_undisturbed_one(
    base_folder: Path, cache: LatentCache, distilled: Path, tmp_path: Path, changes: dict[str, float]
):
    settings = POLISHED.model_copy(update={"polish": POLISH.model_copy(update=changes)})

    class Killer(NullLogger):
        def log(self, metrics: dict[str, float], step: int) -> None:
            if step == 4 and "loss" in metrics:
                raise Killed

    run_polish(base_folder, cache, distilled, tmp_path / "whole", settings)
    with pytest.raises(Killed):
        run_polish(base_folder, cache, distilled, tmp_path / "killed", settings, logger=Killer())
    assert not (tmp_path / "killed" / "adapter").exists()
    run_polish(base_folder, cache, distilled, tmp_path / "killed", settings)
    for name in (lora.WEIGHTS, FACTS):
        assert sha256_file(tmp_path / "killed" / "adapter" / name) == sha256_file(tmp_path / "whole" / "adapter" / name)


@pytest.mark.parametrize("objective", ["tcd", "pcm", "tdd"])
def test_every_objective_is_polished(
    base_folder: Path, cache: LatentCache, distilled: Path, tmp_path: Path, objective: str
):
    settings = POLISHED.model_copy(update={"objective": objective})
    made = run_polish(base_folder, cache, distilled, tmp_path, settings)
    assert made.final_loss == made.final_loss
    assert not torch.equal(
        torch.cat([t.flatten() for t in load_file(tmp_path / "adapter" / lora.WEIGHTS).values()]),
        torch.zeros(1),
    )


def test_an_adapter_of_another_rank_is_refused(base_folder: Path, cache: LatentCache, distilled: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"expected \(8, "):
        run_polish(base_folder, cache, distilled, tmp_path, POLISHED.model_copy(update={"rank": 8}))


@pytest.mark.slow
def test_two_processes_make_the_adapter_of_one(
    base_folder: Path, cache: LatentCache, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    found = []
    for processes in (1, 2):
        work = tmp_path / str(processes)
        arguments = [str(path) for path in (base_folder, cache._folder, distilled, work)]
        if processes == 1:
            subprocess.run([sys.executable, "-m", "tests.support.polisher", *arguments], check=True)
        else:
            assert launcher.launch(Launch(processes=2), "tests.support.polisher", arguments) == 0
        found.append(load_file(work / "adapter" / lora.WEIGHTS))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_over_a_half_precision_base_both_adapters_are_trained_in_fp32(
    base_folder: Path, cache: LatentCache, tmp_path: Path, dtype: torch.dtype
):
    def load() -> bases.LoadedBase:
        settings = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
        return bases.load("mini", settings, base_folder, device=CPU, dtype=dtype, parts=("network",))

    run_distill(load(), cache, tmp_path / "distilled")
    work, base = tmp_path / "polished", load()
    (work / "scratch").mkdir(parents=True)
    polish_adapter(
        base,
        cache,
        POLISHED,
        tmp_path / "distilled" / "adapter",
        work / "scratch",
        work / "adapter",
        identity={"source": "mini"},
        logger=NullLogger(),
        judge=judge_of(base, cache),
    )
    checkpoint = torch.load(work / "scratch" / "checkpoint.pt", weights_only=True)
    for kept in (checkpoint["optimization"], checkpoint["companion"]):
        assert kept["weights"].dtype == kept["average"].dtype == torch.float32
    assert base.network.conv_in.weight.dtype == dtype
    files = [load_file(tmp_path / name / "adapter" / lora.WEIGHTS) for name in ("distilled", "polished")]
    assert {tensor.dtype for tensor in files[1].values()} == {torch.float16}
    assert any(not torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.slow
def test_a_compiled_polish_makes_the_adapter_of_an_eager_one(
    base_folder: Path, cache: LatentCache, distilled: Path, tmp_path: Path
):
    slow = POLISHED.model_copy(update={"polish": POLISH.model_copy(update={"lr": 1e-4, "fake_lr": 1e-4})})
    for name, settings in (("eager", slow), ("compiled", slow.model_copy(update={"compile": True}))):
        distances = iter((3.0, 2.0, 1.0))
        judge = lambda sampler, distances=distances: {"distance@1": next(distances)}  # noqa: E731
        run_polish(base_folder, cache, distilled, tmp_path / name, settings, judge=judge)
    torch._dynamo.reset()
    eager, compiled = (load_file(tmp_path / name / "adapter" / lora.WEIGHTS) for name in ("eager", "compiled"))
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=2e-5, rtol=0, msg=name)


def test_more_steps_than_the_grid_has_are_refused():
    asked = {"polish": {"steps": 1, "anchor": 0.1, "anchor_steps": 30}, "grid": 20, "batch": 4}
    with pytest.raises(ValueError, match="polish: 30 steps are more than the 20 timesteps of grid"):
        Distill.model_validate(asked)
    Distill.model_validate(asked | {"polish": asked["polish"] | {"anchor": 0.0}})  # type: ignore[operator]
