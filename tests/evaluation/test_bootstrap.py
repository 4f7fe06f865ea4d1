from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcmlora.evaluation.measures.bootstrap import Bootstrap, interval
from lcmlora.evaluation.measures.distances import distance

PROMPTS, SEEDS, DIMENSIONS = 4, 8, 4
CAPTIONS = [f"prompt {i % PROMPTS}" for i in range(PROMPTS * SEEDS)]


class World:
    """Gaussians whose mean the prompt decides: a teacher, the same from the noise of the others, and two students."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._means = 1.5 * self._normal(PROMPTS, DIMENSIONS)
        self._root = self._normal(DIMENSIONS, DIMENSIONS)
        self._shift = 0.5 * self._normal(DIMENSIONS)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def draw(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns the teacher's set, its second one and those of the students, all of other noise than before."""
        means = self._means.repeat(SEEDS, 1)
        ours, shared, own = (self._normal(len(CAPTIONS), DIMENSIONS) @ self._root for _ in range(3))
        near = means + self._shift + 0.8 * shared + 0.6 * own
        far = means + 1.4 * self._shift + (0.8 * shared + 0.6 * own) * 1.2
        return means + ours, means + shared, {"near": near, "far": far}


def excess(teacher: Tensor, again: Tensor, sets: dict[str, Tensor], kind: str) -> dict[str, float]:
    floor = distance(teacher, again, kind)
    return {key: distance(teacher, features, kind) - floor for key, features in sets.items()}


@pytest.mark.parametrize("kind", [pytest.param("frechet", marks=pytest.mark.slow), "cmmd"])
def test_nearly_all_intervals_hold_the_expected_excess_and_the_expected_difference(kind: str) -> None:
    world, draws = World(), 120
    many = [excess(*world.draw(), kind) for _ in range(2000)]
    expected = {key: sum(figures[key] for figures in many) / len(many) for key in ("near", "far")}
    held = {"near": 0, "far": 0, "difference": 0}
    for seed in range(draws):
        teacher, again, sets = world.draw()
        estimate = excess(teacher, again, sets, kind)
        samples = Bootstrap(CAPTIONS, resamples=150, seed=seed).excess(teacher, again, sets, kind)
        for key in sets:
            low, high = interval(samples[key], estimate[key])
            held[key] += low <= expected[key] <= high
        low, high = interval(samples["near"] - samples["far"], estimate["near"] - estimate["far"])
        held["difference"] += low <= expected["near"] - expected["far"] <= high
    assert all(0.88 * draws <= count <= 0.995 * draws for count in held.values()), held


def test_resamples_spread_no_less_than_the_figure_moves_from_draw_to_draw_and_at_most_half_more() -> None:
    world = World()
    figures = torch.tensor([excess(*world.draw(), "frechet")["near"] for _ in range(1000)])
    spreads = []
    for seed in range(40):
        samples = Bootstrap(CAPTIONS, resamples=200, seed=seed).excess(*world.draw(), "frechet")["near"]
        spreads.append(samples.std())
    assert 1 < torch.stack(spreads).mean() / figures.std() < 1.5  # more where there are few pictures


@pytest.mark.parametrize("kind", ["frechet", "cmmd"])
def test_weights_do_what_copies_of_the_resampled_pictures_would(kind: str) -> None:
    _, _, sets = World().draw()
    real = World().draw()[0][:20]
    captions = ["one"] * 31 + ["alone"]  # 30 draws of the first 31, each counting 31 / 30, and the last as it is
    bootstrap = Bootstrap(captions, resamples=5, seed=1)
    samples = bootstrap.distance(real, sets, kind)["near"]
    times = (bootstrap._set * 30).round().long()  # 31 for a picture drawn once, 30 for the last
    copies = [sets["near"].repeat_interleave(row, dim=0) for row in times]
    assert {len(c) for c in copies} == {30 * 32}
    for sample, copy in zip(samples, copies, strict=True):
        if kind == "frechet":  # a covariance divides by one less than its pictures, and there are 32 of them
            centred = copy - copy.mean(dim=0)
            copy = copy.mean(dim=0) + centred * ((len(copy) - 1) / len(copy) * 32 / 31) ** 0.5
        assert sample.item() == pytest.approx(distance(real, copy, kind), rel=1e-9)


def test_the_mean_of_hits_moves_as_its_binomial_within_prompts_says() -> None:
    hits = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1] * PROMPTS, dtype=torch.bool)
    captions = [f"prompt {i // SEEDS}" for i in range(len(hits))]
    samples = Bootstrap(captions, resamples=20_000).mean(hits)
    share = 5 / 8
    assert samples.mean().item() == pytest.approx(share, abs=3e-3)
    # The variance of a mean of 8, without bias: divided by 7.
    assert samples.var().item() == pytest.approx(share * (1 - share) / 7 / PROMPTS, rel=0.05)
    low, high = interval(samples, share)
    assert low < share < high
    assert high - low == pytest.approx(2 * 1.96 * samples.std().item(), rel=0.1)


def test_a_figure_that_all_seeds_share_has_no_interval() -> None:
    hits = torch.tensor([i % PROMPTS < 2 for i in range(len(CAPTIONS))])
    assert interval(Bootstrap(CAPTIONS, resamples=50).mean(hits), 0.5) == pytest.approx([0.5, 0.5])


def test_captions_with_one_picture_are_resampled_together() -> None:
    values = torch.tensor([0.0, 1.0, 0.0, 1.0, 5.0, 5.0])
    samples = Bootstrap(["a", "b", "c", "d", "twice", "twice"], resamples=5000).mean(values)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.02)
    assert samples.std().item() == pytest.approx((1 / 3 / 4) ** 0.5 * 4 / 6, rel=0.05)


def test_resamples_are_the_same_for_a_seed_and_for_all_sets() -> None:
    teacher, again, sets = World().draw()
    one = Bootstrap(CAPTIONS, resamples=10, seed=3).excess(teacher, again, sets, "frechet")
    same = Bootstrap(CAPTIONS, resamples=10, seed=3).excess(teacher, again, {"far": sets["far"]}, "frechet")
    other = Bootstrap(CAPTIONS, resamples=10, seed=4).excess(teacher, again, sets, "frechet")
    assert torch.equal(one["far"], same["far"])
    assert not torch.equal(one["far"], other["far"])
    nothing = Bootstrap(CAPTIONS, resamples=10).excess(teacher, again, {"again": again}, "frechet")["again"]
    assert torch.equal(nothing, torch.zeros(10, dtype=torch.float64))


def test_what_cannot_be_resampled_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="1 pictures, 200 resamples"):
        Bootstrap(["one"])
    teacher, again, sets = World().draw()
    with pytest.raises(ValueError, match="10 pictures, and 32 captions are resampled"):
        Bootstrap(CAPTIONS).excess(teacher, again, {"short": sets["near"][:10]}, "frechet")
