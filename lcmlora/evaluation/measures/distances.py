"""How far two sets of pictures are from each other, by their features; one class for each distance.

Features say which distance is theirs (features.py); lcmlora/plugins.py says how one is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lcmlora.plugins import DISTANCES

SIGMA = 10.0  # of CMMD's kernel, for unit vectors; this and the next number are the paper's
SCALE = 1000.0
_RANK = 1e-10  # of the largest variance: what is below has no variance but rounding


@dataclass(frozen=True)
class Expansion:
    """A distance, and to first order its change with the weight of each picture of both sets; each sums to 0.

    fixed: (N,) fp64 on the CPU.
    other: (M,) fp64 on the CPU.
    """

    value: float
    fixed: Tensor
    other: Tensor

    @classmethod
    def of(cls, value: Tensor, fixed: Tensor, other: Tensor) -> Expansion:
        """Returns the expansion, without what a change of all weights alike would do."""
        return cls(value.item(), (fixed - fixed.mean()).cpu(), (other - other.mean()).cpu())


class Distance(ABC):
    """A distance of sets of feature vectors. Pictures may count different weights, by which it is resampled.

    title: what cards and reports call it.
    """

    title: ClassVar[str]

    @abstractmethod
    def weighted(self, a: Tensor, a_weights: Tensor, b: Tensor, b_weights: Tensor) -> Tensor:
        """Returns the distance () of the sets a (N, D) and b (M, D), whose pictures count (N,) and (M,); all fp64.

        Weights are not negative and sum to the number of pictures. torch must be able to differentiate the distance
        with respect to them, unless `expand` is overridden.
        """

    def between(self, a: Tensor, b: Tensor) -> float:
        """Returns the distance of the sets a (N, D) and b (M, D).

        Raises:
            ValueError: one has fewer than `pictures_needed`.
        """
        return self.between_few(a, b)

    def between_few(self, a: Tensor, b: Tensor) -> float:
        """Returns the distance of sets that may have fewer than `pictures_needed`.

        It is biased by the number of pictures, but ranks sets of as many pictures by their distance to one set.
        """
        a, b = a.double(), b.double()
        return self.weighted(a, torch.ones_like(a[:, 0]), b, torch.ones_like(b[:, 0])).item()

    def pictures_needed(self, dimensions: int) -> int:
        """Returns how many pictures a set must have."""
        del dimensions
        return 2

    def expand(self, fixed: Tensor, sets: Sequence[Tensor]) -> list[Expansion]:
        """Returns the distance of `fixed` (N, D) to each of the sets (M, D), all fp64, and its changes with weights."""
        found = []
        for features in sets:
            weights = [torch.ones_like(each[:, 0], requires_grad=True) for each in (fixed, features)]
            value = self.weighted(fixed, weights[0], features, weights[1])
            found.append(Expansion.of(value.detach(), *torch.autograd.grad(value, weights)))
        return found


def distance(a: Tensor, b: Tensor, kind: str) -> float:
    """Returns the distance of this name of the sets a (N, D) and b (M, D). Raises as `Distance.between`."""
    return named(kind).between(a, b)


def named(kind: str) -> Distance:
    """Returns the distance of this name. Raises UserError where there is none."""
    found: Distance = DISTANCES.get(kind)()
    return found


def title_of(kind: str) -> str:
    """Returns what people call this distance; its name, where it was added by a package that is not installed here."""
    return named(kind).title if kind in DISTANCES.names else kind


class Frechet(Distance):
    """The squared Frechet distance of Gaussians fitted to the sets (arXiv 1706.08500, eq. 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) with covariances A and B, computed in fp64. With
    A = Ra^T Ra and B = Rb^T Rb the last trace is the sum of the singular values of Ra Rb^T, so no matrix root and no
    rounding below zero is met. It is symmetric, and biased upwards for small sets: compare equal counts only, and
    against the distance of two sets of the same source.
    """

    title = "Fréchet distance"

    def between(self, a: Tensor, b: Tensor) -> float:
        count, dimensions = min(len(a), len(b)), a.shape[1]
        if count < self.pictures_needed(dimensions):
            raise ValueError(f"a Frechet distance needs more pictures than dimensions: {count} pictures, {dimensions}")
        return self.between_few(a, b)

    def between_few(self, a: Tensor, b: Tensor) -> float:
        mean_a, root_a = _moments(a)
        mean_b, root_b = _moments(b)
        cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
        distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
        return max(distance.item(), 0.0)

    def pictures_needed(self, dimensions: int) -> int:
        return dimensions + 1

    def weighted(self, a: Tensor, a_weights: Tensor, b: Tensor, b_weights: Tensor) -> Tensor:
        (mean_a, cov_a), (mean_b, cov_b) = _weighted_moments(a, a_weights), _weighted_moments(b, b_weights)
        root = _Root(cov_a)
        # In fp32 the rounding of the eigenvalues would be 2e-4 of the largest root in each of D terms.
        cross = torch.linalg.eigvalsh(root.half @ cov_b @ root.half).clamp(min=0).sqrt().sum()
        return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross

    def expand(self, fixed: Tensor, sets: Sequence[Tensor]) -> list[Expansion]:
        # The distance's derivative is 1 - T_AB with respect to A, 1 - T_BA with respect to B, where the maps
        # T_AB = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2 and T_BA = T_AB^-1 take one Gaussian to the other.
        count = len(fixed)
        mean, covariance = _weighted_moments(fixed, torch.ones_like(fixed[:, 0]))
        root = _Root(covariance)
        centred = fixed - mean
        found = []
        for features in sets:
            other_count = len(features)
            other_mean, other = _weighted_moments(features, torch.ones_like(features[:, 0]))
            cross = _Root(root.half @ other @ root.half)
            there = root.inverse_half @ cross.half @ root.inverse_half
            back = root.half @ cross.inverse_half @ root.half
            shift, other_centred = mean - other_mean, features - other_mean
            value = shift.square().sum() + covariance.trace() + other.trace() - 2 * cross.half.trace()
            own = 2 * centred @ shift / count + _quadratic(centred, there) / (count - 1)
            others = -2 * other_centred @ shift / other_count + _quadratic(other_centred, back) / (other_count - 1)
            found.append(Expansion.of(value, own, others))
        return found


class Cmmd(Distance):
    """CMMD of sets of unit vectors: 1000 times the squared MMD (arXiv 2401.09603).

    As in the authors' code it is the estimator of minimum variance, mean k(a, a') + mean k(b, b') - 2 mean k(a, b) with
    each picture paired with itself too (Gretton et al., JMLR 13, 2012, eq. 5). It is biased upwards by no more than
    SCALE / SIGMA^2 * (1 / N + 1 / M), and less the more alike the pictures are.
    """

    title = "CMMD"

    def between(self, a: Tensor, b: Tensor) -> float:
        if min(len(a), len(b)) < self.pictures_needed(a.shape[1]):
            raise ValueError(f"CMMD needs at least two pictures of each set, got {len(a)} and {len(b)}")
        squared = kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean()
        return max(SCALE * squared.item(), 0.0)

    def weighted(self, a: Tensor, a_weights: Tensor, b: Tensor, b_weights: Tensor) -> Tensor:
        p, q = a_weights / len(a), b_weights / len(b)
        return SCALE * (p @ kernel(a, a) @ p + q @ kernel(b, b) @ q - 2 * p @ kernel(a, b) @ q)

    def expand(self, fixed: Tensor, sets: Sequence[Tensor]) -> list[Expansion]:
        own = kernel(fixed, fixed).mean(dim=1)
        found = []
        for features in sets:
            across, other = kernel(fixed, features), kernel(features, features).mean(dim=1)
            value = SCALE * (own.mean() + other.mean() - 2 * across.mean())
            changes = (own - across.mean(dim=1)) / len(fixed), (other - across.mean(dim=0)) / len(features)
            found.append(Expansion.of(value, *(2 * SCALE * change for change in changes)))
        return found


class _Root:
    """The root of a covariance (D, D), and the inverse of the root where the covariance has variance."""

    def __init__(self, covariance: Tensor) -> None:
        values, vectors = torch.linalg.eigh(covariance)
        roots = values.clamp(min=0).sqrt()  # what is below zero is rounding
        inverse = torch.where(values > _RANK * values[-1], 1 / roots.clamp(min=1e-300), 0)
        self.half = (vectors * roots) @ vectors.T
        self.inverse_half = (vectors * inverse) @ vectors.T


def _quadratic(centred: Tensor, there: Tensor) -> Tensor:
    """Returns x^T (1 - T) x (N,) of rows x (N, D)."""
    return centred.square().sum(dim=1) - ((centred @ there) * centred).sum(dim=1)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (D,) and a root R of the covariance, R^T R, both fp64; R is (D, D), of few pictures (N, D)."""
    count = len(features)
    x = features.double()
    mean = x.mean(dim=0)
    return mean, torch.linalg.qr((x - mean) / (count - 1) ** 0.5, mode="r").R


def _weighted_moments(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean (D,) and covariance (D, D) of features (N, D) that count `weights` (N,), which sum to N."""
    count = len(features)
    mean = weights @ features / count
    second = features.T @ (features * weights[:, None])
    return mean, (second - count * torch.outer(mean, mean)) / (count - 1)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Returns k - 1 (N, M), fp64, of a (N, D) and b (M, D), for the Gaussian kernel k = exp(-|x - y|^2 / 2 SIGMA^2).

    At this width all k are close to 1, which every difference of means loses: without it nothing is rounded away.
    """
    x, y = a.double(), b.double()
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return torch.expm1(squares.clamp(min=0) / (-2 * SIGMA**2))
