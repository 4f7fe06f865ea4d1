from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lcmlora.evaluation.measures.distances import Cmmd, Frechet, distance, named
from lcmlora.evaluation.measures.metrics import diversity, retrieval_at_1, retrieval_hits

frechet_distance, cmmd = Frechet().between, Cmmd().between


def gaussian(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Returns a sample (count, D) whose mean and covariance are exactly these."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (count - 1)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def covariance(dimensions: int, seed: int) -> Tensor:
    root = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(dimensions, dtype=torch.float64)


def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([3.0, 1.0, -2.0]).double()
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 1.0]).double()
    expected = 9 + 16 + (1 + 0 + 4)  # |mean|^2 + sum (sqrt a - sqrt b)^2
    distance = frechet_distance(gaussian(mean_a, a.diag(), 40, 0), gaussian(mean_b, b.diag(), 60, 1))
    assert distance == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_turned_gaussians_is_the_trace_of_a_matrix_root() -> None:
    a, b, zero = covariance(12, 0), covariance(12, 1), torch.zeros(12, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvals(a @ b).real  # of a product of two positive matrices: positive
    expected = (a.trace() + b.trace() - 2 * eigenvalues.sqrt().sum()).item()
    assert frechet_distance(gaussian(zero, a, 50, 0), gaussian(zero, b, 50, 1)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_and_zero_for_the_same_set() -> None:
    a = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).half()
    b = torch.randn(60, 20, generator=torch.Generator().manual_seed(1)).half() * 2 + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 20
    assert 0 <= frechet_distance(a, a) < 1e-9
    # Features that are constant make a covariance without full rank.
    assert 0 <= frechet_distance(torch.ones(30, 5), torch.ones(30, 5)) < 1e-12


def test_fewer_pictures_than_dimensions_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="320 pictures, 320"):
        frechet_distance(torch.randn(400, 320), torch.randn(320, 320))


def test_retrieval_counts_pictures_whose_nearest_real_one_has_their_caption() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]) + 100  # what all share must not decide
    captions = ["apple", "tree", "dog"]
    pictures = torch.tensor([[3.0, 0.2], [0.1, 0.5], [0.9, 0.1], [-2.0, -2.0]]) + 100
    assert retrieval_at_1(pictures, ["apple", "tree", "tree", "dog"], gallery, captions) == 0.75


def test_hits_say_which_pictures_they_are() -> None:
    gallery, captions = torch.eye(3), ["apple", "tree", "dog"]
    hits = retrieval_hits(torch.eye(3)[[0, 2, 1]], captions, gallery, captions)
    assert hits.dtype == torch.bool
    assert hits.tolist() == [True, False, False]


def test_retrieval_without_pictures_or_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 3"):
        retrieval_at_1(torch.zeros(0, 2), [], torch.randn(3, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 pictures with 1"):
        retrieval_at_1(torch.randn(2, 2), ["a"], torch.randn(3, 2), ["a", "b", "c"])


def units(count: int, dimensions: int, seed: int, towards: float = 0.0) -> Tensor:
    x = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x + towards, dim=1)


def test_cmmd_is_the_squared_distance_of_mean_kernels_times_a_thousand() -> None:
    a, b = units(7, 5, 0), units(9, 5, 1, towards=0.5)

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        return sum(torch.exp(-(p - q).square().sum() / 200).item() for p in x for q in y) / (len(x) * len(y))

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert cmmd(b, a) == pytest.approx(cmmd(a, b), rel=1e-12)


def test_cmmd_of_two_points_is_the_closed_form_and_of_the_same_set_nothing() -> None:
    a, b = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 3)
    assert cmmd(a, b) == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-12)
    assert 0 <= cmmd(units(20, 8, 0), units(20, 8, 0)) < 1e-9


def test_cmmd_of_one_source_is_about_its_bias_and_grows_with_what_is_apart() -> None:
    same, bias = cmmd(units(100, 8, 0), units(200, 8, 1)), 10 * (1 / 100 + 1 / 200)
    near, far = (cmmd(units(100, 8, 0), units(200, 8, 1, towards)) for towards in (0.3, 1.0))
    assert same == pytest.approx(bias, rel=0.2)  # nearly the bound, as these point in all directions
    assert same < near < far
    # Half precision, in which features are kept, changes no figure that is read.
    assert cmmd(units(100, 8, 0).half(), units(200, 8, 1, 0.3).half()) == pytest.approx(near, rel=2e-3)


def test_a_distance_is_chosen_by_its_name_and_says_how_many_pictures_it_needs() -> None:
    a, b = units(30, 4, 0), units(40, 4, 1, towards=0.5)
    assert distance(a, b, "frechet") == frechet_distance(a, b)
    assert distance(a, b, "cmmd") == cmmd(a, b)
    for kind, needed in (("frechet", 5), ("cmmd", 2)):
        assert named(kind).pictures_needed(4) == needed
        assert distance(a[:needed], b, kind) > 0
        with pytest.raises(ValueError, match=f"{needed - 1}"):
            distance(a[: needed - 1], b, kind)


def test_diversity_is_the_mean_cosine_distance_within_captions() -> None:
    right, up, left = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    mean = torch.tensor([100.0, 100.0])  # what all share must hide no difference
    # Of "a": right, right and up: distances 0, 1 and 1. Of "b": up and left. "c" has one picture and no pair.
    features = torch.tensor([right, up, right, left, up, up]) + mean
    captions = ["a", "b", "a", "b", "a", "c"]
    assert diversity(features, captions, mean) == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)
    # Prompts that draw one picture each have none, whatever their number.
    assert diversity(features[[0, 0, 3, 3]], ["a", "a", "b", "b"]) == pytest.approx(0, abs=1e-9)


def test_diversity_takes_off_the_sets_own_mean_where_no_other_is_given() -> None:
    features, captions = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) + 5, ["a", "b", "c"] * 4
    assert diversity(features, captions) == pytest.approx(diversity(features, captions, features.mean(dim=0)), rel=1e-6)
    assert diversity(features, captions) > 20 * diversity(features, captions, torch.zeros(6))


def test_pictures_that_are_all_the_same_have_no_diversity() -> None:
    same = torch.ones(4, 3)
    assert diversity(same, ["a", "a", "b", "b"]) == 0
    assert diversity(same, ["a", "a", "b", "b"], torch.ones(3)) == 0


def test_diversity_without_two_pictures_of_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="two pictures of a caption; each of the 3 has one"):
        diversity(torch.randn(3, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="3 pictures with 1"):
        diversity(torch.randn(3, 2), ["a"])
