from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcmlora.evaluation.metrics import frechet_distance, retrieval_at_1


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


def test_retrieval_without_pictures_or_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 3"):
        retrieval_at_1(torch.zeros(0, 2), [], torch.randn(3, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 pictures with 1"):
        retrieval_at_1(torch.randn(2, 2), ["a"], torch.randn(3, 2), ["a", "b", "c"])
