"""Distances between sets of pictures, from their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (D,) and a root R (D, D) of the covariance, R^T R, both fp64."""
    count, dimensions = features.shape
    if count <= dimensions:
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


def retrieval_at_1(
    features: Tensor, captions: Sequence[str], gallery: Tensor, gallery_captions: Sequence[str]
) -> float:
    """Returns the share of pictures whose nearest gallery picture carries their caption.

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
    a, b = (torch.nn.functional.normalize(x.double() - mean, dim=1) for x in (features, gallery))
    nearest = (a @ b.T).argmax(dim=1).tolist()
    return sum(captions[i] == gallery_captions[j] for i, j in enumerate(nearest)) / len(captions)
