"""What sets of pictures say of each other and of their captions, from their features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
