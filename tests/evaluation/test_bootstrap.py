from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcmlora.evaluation.measures.bootstrap import Bootstrap, interval, student_t
from lcmlora.evaluation.measures.distances import Distance, distance, named

PROMPTS, SEEDS, DIMENSIONS = 12, 6, 4
CAPTIONS = [f"prompt {i % PROMPTS}" for i in range(PROMPTS * SEEDS)]


class World:
    """Gaussians whose mean the prompt decides: a teacher, the same from the noise of the others, and two students.

    Args:
        strength: how far the means of prompts lie apart.
        fixed: whether all draws have the same prompts.
    """

    def __init__(self, strength: float = 1.0, *, fixed: bool = False) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._strength = strength
        self._root = self._normal(DIMENSIONS, DIMENSIONS)
        self._shift = 0.5 * self._normal(DIMENSIONS)
        self._prompts = self._normal(PROMPTS, DIMENSIONS) if fixed else None

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def draw(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns the teacher's set, its second one and those of the students, all of other noise than before."""
        prompts = self._normal(PROMPTS, DIMENSIONS) if self._prompts is None else self._prompts
        means = self._strength * prompts.repeat(SEEDS, 1)
        ours, shared, own = (self._normal(len(CAPTIONS), DIMENSIONS) @ self._root for _ in range(3))
        near = 0.8 * means + self._shift + 0.8 * shared + 0.6 * own
        far = 0.7 * means + 1.4 * self._shift + (0.8 * shared + 0.6 * own) * 1.2
        return means + ours, means + shared, {"near": near, "far": far}


def excess(teacher: Tensor, again: Tensor, sets: dict[str, Tensor], kind: str) -> dict[str, float]:
    floor = distance(teacher, again, kind)
    return {key: distance(teacher, features, kind) - floor for key, features in sets.items()}


@pytest.mark.parametrize("kind", ["frechet", "cmmd"])
def test_nearly_all_intervals_hold_the_expected_excess_and_the_expected_difference(kind: str) -> None:
    world, draws = World(), 120
    many = [excess(*world.draw(), kind) for _ in range(1000)]
    expected = {key: sum(figures[key] for figures in many) / len(many) for key in ("near", "far")}
    held = {"near": 0, "far": 0, "difference": 0}
    for seed in range(draws):
        teacher, again, sets = world.draw()
        estimate = excess(teacher, again, sets, kind)
        samples = Bootstrap(CAPTIONS, resamples=200, seed=seed).excess(teacher, again, sets, kind)
        for key in sets:
            low, high = interval(samples[key], estimate[key])
            held[key] += low <= expected[key] <= high
        low, high = interval(samples["near"] - samples["far"], estimate["near"] - estimate["far"])
        held["difference"] += low <= expected["near"] - expected["far"] <= high
    assert all(0.88 * draws <= count <= 0.995 * draws for count in held.values()), held


def spreads(world: World, kind: str, *, seeds: bool) -> float:
    """Returns how far resamples spread, as a multiple of how far the figure moves from draw to draw."""
    figures = torch.tensor([excess(*world.draw(), kind)["near"] for _ in range(500)])
    found = []
    for seed in range(40):
        bootstrap = Bootstrap(CAPTIONS, resamples=200, seed=seed)
        found.append(bootstrap.samples(bootstrap.expand_excess(*world.draw(), kind)["near"], seeds=seeds).std())
    return (torch.stack(found).mean() / figures.std()).item()


@pytest.mark.parametrize("kind", ["frechet", "cmmd"])
def test_resamples_of_captions_spread_as_far_as_new_captions_and_seeds_move_the_figure(kind: str) -> None:
    assert 0.9 < spreads(World(), kind, seeds=False) / (student_t(0.95, PROMPTS - 1) / 1.96) < 1.3


def test_resamples_of_seeds_spread_as_far_as_new_seeds_move_the_figure_of_the_same_captions() -> None:
    assert 0.9 < spreads(World(fixed=True), "frechet", seeds=True) < 1.4


def test_seeds_alone_do_not_tell_how_far_captions_move_the_figure() -> None:
    assert spreads(World(strength=8.0), "frechet", seeds=True) < 0.85


@pytest.mark.parametrize("kind", ["frechet", "cmmd"])
def test_the_change_of_a_distance_with_weights_is_its_derivative(kind: str) -> None:
    teacher, _, sets = World().draw()
    real = teacher[:20]
    (found,) = named(kind).expand(real, [sets["near"]])
    (differentiated,) = Distance.expand(named(kind), real, [sets["near"]])
    assert found.value == pytest.approx(distance(real, sets["near"], kind), rel=1e-9)
    torch.testing.assert_close(found.fixed, differentiated.fixed, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.other, differentiated.other, rtol=1e-6, atol=1e-9)
    ones, others, step = torch.ones(20).double(), torch.ones(len(CAPTIONS)).double(), 1e-5
    moved = others.clone()
    moved[3] += step
    moved[5] -= step
    change = named(kind).weighted(real, ones, sets["near"], moved) - found.value
    assert change.item() == pytest.approx(step * (found.other[3] - found.other[5]).item(), rel=1e-3)


def test_a_distance_of_pictures_that_never_vary_in_one_direction_has_an_interval() -> None:
    teacher, again, sets = World().draw()
    flat = torch.zeros(len(CAPTIONS), 1).double()
    wide = [torch.cat([features, flat], dim=1) for features in (teacher, again, sets["near"])]
    narrow = Bootstrap(CAPTIONS).excess(teacher, again, {"near": sets["near"]}, "frechet")["near"]
    found = Bootstrap(CAPTIONS).excess(wide[0], wide[1], {"near": wide[2]}, "frechet")["near"]
    torch.testing.assert_close(found, narrow, rtol=1e-6, atol=1e-8)


def test_the_mean_of_hits_moves_as_the_means_of_its_captions_say() -> None:
    hits = torch.tensor([1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    captions = [f"prompt {i // 3}" for i in range(len(hits))]
    samples = Bootstrap(captions, resamples=20_000).mean(hits)
    means = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3])
    assert samples.mean().item() == pytest.approx(0.5, abs=0.02)
    # Student's t of three degrees of freedom instead of the normal distribution's quantile.
    assert samples.std().item() == pytest.approx((means.var() / 4).sqrt().item() * 3.1824 / 1.96, rel=0.02)


def test_the_mean_of_hits_moves_with_seeds_as_its_binomial_within_captions_says() -> None:
    hits = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1] * 4, dtype=torch.bool)
    captions = [f"prompt {i // 8}" for i in range(len(hits))]
    samples = Bootstrap(captions, resamples=20_000).mean(hits, seeds=True)
    share = 5 / 8
    assert samples.mean().item() == pytest.approx(share, abs=3e-3)
    # The variance of a mean of 8, without bias: divided by 7.
    assert samples.var().item() == pytest.approx(share * (1 - share) / 7 / 4, rel=0.05)
    low, high = interval(samples, share)
    assert high - low == pytest.approx(2 * 1.96 * samples.std().item(), rel=0.1)


def test_a_figure_that_all_seeds_share_moves_with_captions_alone() -> None:
    hits = torch.tensor([i % PROMPTS < 2 for i in range(len(CAPTIONS))])
    bootstrap = Bootstrap(CAPTIONS)
    assert interval(bootstrap.mean(hits, seeds=True), 1 / 6) == pytest.approx([1 / 6, 1 / 6])
    low, high = interval(bootstrap.mean(hits), 1 / 6)
    assert low < 1 / 6 - 0.1 and high > 1 / 6 + 0.1


def test_captions_with_one_picture_have_no_seeds_of_their_own_and_are_resampled_together() -> None:
    values = torch.tensor([0.0, 1.0, 0.0, 1.0, 5.0, 5.0])
    samples = Bootstrap(["a", "b", "c", "d", "twice", "twice"], resamples=5000).mean(values, seeds=True)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.02)
    assert samples.std().item() == pytest.approx((1 / 3 / 4) ** 0.5 * 4 / 6, rel=0.05)


def test_one_caption_cannot_be_resampled_and_its_seeds_are() -> None:
    values = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    bootstrap = Bootstrap(["the same"] * 6, resamples=5000)
    assert bootstrap.captions == 1
    assert bootstrap.mean(values).std().item() == pytest.approx((0.3 / 6) ** 0.5 * 2.5706 / 1.96, rel=0.05)


def test_two_captions_say_next_to_nothing_and_their_interval_says_so() -> None:
    values = torch.tensor([0.4, 0.6] * 20)
    low, high = interval(Bootstrap(["one", "other"] * 20).mean(values), 0.5)
    assert high - low == pytest.approx(2 * 0.1 * 12.7062 / 1.96, rel=0.01)


def test_real_pictures_are_resampled_with_the_drawn_ones_of_their_caption() -> None:
    teacher, _, sets = World(strength=3.0).draw()
    bootstrap = Bootstrap(CAPTIONS)
    together, alone, unknown = (
        bootstrap.distance(teacher, sets, "frechet", captions)["near"].std().item()
        for captions in (CAPTIONS, None, ["another"] * len(CAPTIONS))
    )
    assert together != pytest.approx(alone, rel=0.05) and unknown == alone


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (31, 2.0395), (1000, 1.9623)]
)
def test_the_quantiles_are_students(freedom: int, quantile: float) -> None:
    assert student_t(0.95, freedom) == pytest.approx(quantile, abs=1e-4)


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
    with pytest.raises(ValueError, match="1 pictures, 1000 resamples"):
        Bootstrap(["one"])
    teacher, again, sets = World().draw()
    with pytest.raises(ValueError, match="10 pictures, and 72 captions are resampled"):
        Bootstrap(CAPTIONS).excess(teacher, again, {"short": sets["near"][:10]}, "frechet")
