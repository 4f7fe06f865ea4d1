"""How far two sets of pictures are from each other, by their features; one class for each distance.

Features say which distance is theirs (features.py); lcmlora/plugins.py says how one is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lcmlora.plugins import DISTANCES
from lcmlora.progress import track

SIGMA = 10.0  # of CMMD's kernel, for unit vectors; this and the next number are the paper's
SCALE = 1000.0


class Distance(ABC):
    """A distance of sets of feature vectors. Pictures may count different weights, which is how it is resampled.

    title: what cards and reports call it.
    """

    title: ClassVar[str]

    @abstractmethod
    def weighted(self, a: Tensor, a_weights: Tensor, b: Tensor, b_weights: Tensor) -> Tensor:
        """Returns the distance () of the sets a (N, D) and b (M, D), whose pictures count (N,) and (M,); all fp64.

        Weights are not negative and sum to the number of pictures.
        """

    def between(self, a: Tensor, b: Tensor) -> float:
        """Returns the distance of the sets a (N, D) and b (M, D).

        Raises:
            ValueError: one has fewer than `pictures_needed`.
        """
        a, b = a.double(), b.double()
        return self.weighted(a, torch.ones_like(a[:, 0]), b, torch.ones_like(b[:, 0])).item()

    def pictures_needed(self, dimensions: int) -> int:
        """Returns how many pictures a set must have."""
        del dimensions
        return 2

    def resampled(self, fixed: Tensor, weights: Tensor, sets: list[Tensor], set_weights: Tensor) -> Tensor:
        """Returns the distance of `fixed` to each of the sets in each of R resamples, (R, sets) fp64.

        Args:
            fixed: (N, D) fp64.
            weights: of its pictures, (R, N), or (1, N) where they are the same in all resamples.
            sets: each (M, D) fp64.
            set_weights: of their pictures, (R, M).
        """
        rows = []
        for i in track(range(len(set_weights)), "resamples"):
            own = weights[min(i, len(weights) - 1)]
            rows.append(torch.stack([self.weighted(fixed, own, features, set_weights[i]) for features in sets]))
        return torch.stack(rows)


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
        mean_a, root_a = _moments(a)
        mean_b, root_b = _moments(b)
        cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
        distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
        return max(distance.item(), 0.0)

    def pictures_needed(self, dimensions: int) -> int:
        return dimensions + 1

    def weighted(self, a: Tensor, a_weights: Tensor, b: Tensor, b_weights: Tensor) -> Tensor:
        return self.resampled(a, a_weights[None], [b], b_weights[None])[0, 0]

    def resampled(self, fixed: Tensor, weights: Tensor, sets: list[Tensor], set_weights: Tensor) -> Tensor:
        # The trace of (A^1/2 B A^1/2)^1/2 is the sum of the roots of the eigenvalues, of which the negative ones are
        # rounding. In fp32 that rounding would be 2e-4 of the largest root in each of D terms.
        rows = []
        for i in track(range(len(set_weights)), "resamples"):
            if i < len(weights):
                mean, covariance = _weighted_moments(fixed, weights[i])
                values, vectors = torch.linalg.eigh(covariance)
                root = values.clamp(min=0).sqrt()[:, None] * vectors.T
            row = []
            for features in sets:
                other_mean, other = _weighted_moments(features, set_weights[i])
                cross = torch.linalg.eigvalsh(root @ other @ root.T).clamp(min=0).sqrt().sum()
                row.append((mean - other_mean).square().sum() + covariance.trace() + other.trace() - 2 * cross)
            rows.append(torch.stack(row))
        return torch.stack(rows)


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
        return self.resampled(a, a_weights[None], [b], b_weights[None])[0, 0]

    def resampled(self, fixed: Tensor, weights: Tensor, sets: list[Tensor], set_weights: Tensor) -> Tensor:
        a, b = weights / len(fixed), set_weights / set_weights.shape[1]
        own = ((a @ kernel(fixed, fixed)) * a).sum(dim=1)
        columns = []
        for features in track(sets, "resamples"):
            other = ((b @ kernel(features, features)) * b).sum(dim=1)
            columns.append(SCALE * (own + other - 2 * ((a @ kernel(fixed, features)) * b).sum(dim=1)))
        return torch.stack(columns, dim=1)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (D,) and a root R (D, D) of the covariance, R^T R, both fp64."""
    count, dimensions = features.shape
    if count < dimensions + 1:
        raise ValueError(f"a Frechet distance needs more pictures than dimensions: {count} pictures, {dimensions}")
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
