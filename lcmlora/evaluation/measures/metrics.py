"""What sets of pictures say of each other and of their captions, from their features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["frechet", "cmmd"]  # which of them, the features say


def distance(a: Tensor, b: Tensor, kind: Distance) -> float:
    """Returns the distance of the sets a (N, D) and b (M, D). Raises ValueError where one has too few pictures."""
    return frechet_distance(a, b) if kind == "frechet" else cmmd(a, b)


def pictures_needed(kind: Distance, dimensions: int) -> int:
    """Returns how many pictures a set must have for this distance."""
    return dimensions + 1 if kind == "frechet" else 2


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (D,) and a root R (D, D) of the covariance, R^T R, both fp64."""
    count, dimensions = features.shape
    if count < pictures_needed("frechet", dimensions):
        raise ValueError(f"a Frechet distance needs more pictures than dimensions: {count} pictures, {dimensions}")
    x = features.double()
    mean = x.mean(dim=0)
    return mean, torch.linalg.qr((x - mean) / (count - 1) ** 0.5, mode="r").R


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Returns the squared Frechet distance of Gaussians fitted to the sets a (N, D) and b (M, D), computed in fp64.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) with covariances A, B (arXiv 1706.08500, eq. 6). With
    A = Ra^T Ra and B = Rb^T Rb the last trace is the sum of the singular values of Ra Rb^T, so no matrix root and no
    rounding below zero is met. It is symmetric, and biased upwards for small sets: compare equal counts only, and
    against the distance of two sets of the same source.

    Raises:
        ValueError: a set has no more pictures than dimensions.
    """
    mean_a, root_a = _moments(a)
    mean_b, root_b = _moments(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)


SIGMA = 10.0  # of CMMD's kernel, for unit vectors; this and the next number are the paper's
SCALE = 1000.0


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Returns k - 1 (N, M), fp64, of a (N, D) and b (M, D), for the Gaussian kernel k = exp(-|x - y|^2 / 2 SIGMA^2).

    At this width all k are close to 1, which every difference of means loses: without it nothing is rounded away.
    """
    x, y = a.double(), b.double()
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return torch.expm1(squares.clamp(min=0) / (-2 * SIGMA**2))


def cmmd(a: Tensor, b: Tensor) -> float:
    """Returns CMMD of the sets a (N, D) and b (M, D) of unit vectors: 1000 times the squared MMD (arXiv 2401.09603).

    As in the authors' code it is the estimator of minimum variance, mean k(a, a') + mean k(b, b') - 2 mean k(a, b) with
    each picture paired with itself too (Gretton et al., JMLR 13, 2012, eq. 5). It is biased upwards by no more than
    SCALE / SIGMA^2 * (1 / N + 1 / M), and less the more alike the pictures are.

    Raises:
        ValueError: a set has fewer than two pictures.
    """
    if min(len(a), len(b)) < pictures_needed("cmmd", a.shape[1]):
        raise ValueError(f"CMMD needs at least two pictures of each set, got {len(a)} and {len(b)}")
    squared = kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean()
    return max(SCALE * squared.item(), 0.0)


def diversity(features: Tensor, captions: Sequence[str], mean: Tensor | None = None) -> float:
    """Returns the mean cosine distance between two pictures of one caption: 0 where all seeds draw the same picture.

    It is the mean over captions, each counted once, of the mean over its pairs of pictures.

    Args:
        features: (N, D), with N captions.
        mean: (D,), what all pictures share and what is taken off first, so that a common direction hides no
            difference; the set's own mean where it is None. Sets that are compared want one mean, the teacher's say.

    Raises:
        ValueError: no caption has two pictures, or not every picture has a caption.
    """
    if len(features) != len(captions):
        raise ValueError(f"one caption for each picture: {len(features)} pictures with {len(captions)}")
    groups: dict[str, list[int]] = defaultdict(list)
    for i, caption in enumerate(captions):
        groups[caption].append(i)
    pairs = [indices for indices in groups.values() if len(indices) > 1]
    if not pairs:
        raise ValueError(f"diversity needs two pictures of a caption; each of the {len(groups)} has one")
    x = features.double()
    x = F.normalize(x - (x.mean(dim=0) if mean is None else mean.double()), dim=1)
    same = (x == 0).all(dim=1).double()  # pictures that are what all share, which have no direction, and no distance
    means = []
    for indices in pairs:
        count = len(indices)
        cosines = x[indices] @ x[indices].T + torch.outer(same[indices], same[indices])
        means.append(1 - (cosines.sum() - cosines.trace()) / (count * (count - 1)))
    return torch.stack(means).mean().item()


def retrieval_hits(
    features: Tensor, captions: Sequence[str], gallery: Tensor, gallery_captions: Sequence[str]
) -> Tensor:
    """Returns of which pictures the nearest gallery picture carries their caption, (N,) bool.

    Nearest by cosine after taking off the gallery's mean, which all pictures share and which says nothing of a subject.

    Args:
        features: (N, D), with N captions.
        gallery: (M, D), with M captions.

    Raises:
        ValueError: an empty set, or a caption missing for a picture.
    """
    if not len(features) or not len(gallery):
        raise ValueError(f"retrieval needs pictures, got {len(features)} and {len(gallery)} in the gallery")
    if len(features) != len(captions) or len(gallery) != len(gallery_captions):
        raise ValueError(
            f"one caption for each picture: {len(features)} pictures with {len(captions)}, "
            f"{len(gallery)} in the gallery with {len(gallery_captions)}"
        )
    mean = gallery.double().mean(dim=0)
    a, b = (F.normalize(x.double() - mean, dim=1) for x in (features, gallery))
    nearest = (a @ b.T).argmax(dim=1).tolist()
    return torch.tensor([captions[i] == gallery_captions[j] for i, j in enumerate(nearest)])


def retrieval_at_1(
    features: Tensor, captions: Sequence[str], gallery: Tensor, gallery_captions: Sequence[str]
) -> float:
    """Returns the share of `retrieval_hits`, which says what is what and what is refused."""
    return retrieval_hits(features, captions, gallery, gallery_captions).double().mean().item()
