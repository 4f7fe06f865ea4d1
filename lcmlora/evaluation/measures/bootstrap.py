"""Confidence intervals: how far a figure would move if the same prompts were drawn again from other seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lcmlora.evaluation.measures.distances import named

K = TypeVar("K", bound=str)  # the name of a set


class Bootstrap:
    """Resamples of a set of pictures, and the figures of each resample.

    Pictures are resampled within their caption: the prompts stay, the seeds vary. Of n pictures of a caption n - 1 are
    drawn with replacement and count n / (n - 1) each, without which the spread would be (n - 1) / n of what it is
    (Rao and Wu, JASA 83, 1988). Captions with one picture have no other seed, and are resampled as if they were one
    caption; the interval is then wider, since their prompts vary too.

    All compared sets start picture i from the same noise and have the same resamples, so that `a - b` of two results
    are the resamples of a paired difference. The teacher's set starts from other noise and has resamples of its own.

    Intervals of distances err on the wide side: of Gaussians with the moments of the emoji features, 512 of 320
    dimensions, resamples spread 1.1 to 1.25 times as far as new draws do.

    A resample is a set of weights (N,), and a figure a function of them, so that no pictures are copied. The cost is
    in the Frechet distances: about 8 ms each for 320 dimensions and 512 pictures on one core, and with the cube of the
    dimensions: Inception's 2048 want a GPU or fewer resamples.
    """

    def __init__(
        self,
        captions: Sequence[str],
        *,
        resamples: int = 200,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Draws the weights, which these captions, `resamples` and `seed` determine.

        Args:
            captions: of the N pictures of each set, in their order.
            device: on which distances are computed, in fp64.

        Raises:
            ValueError: fewer than two pictures, or fewer than two resamples.
        """
        if len(captions) < 2 or resamples < 2:
            raise ValueError(f"nothing to resample: {len(captions)} pictures, {resamples} resamples")
        generator = torch.Generator().manual_seed(seed)
        self._device = device or torch.device("cpu")
        self._teacher = _weights(captions, resamples, generator).to(self._device)
        self._set = _weights(captions, resamples, generator).to(self._device)

    def excess(self, teacher: Tensor, again: Tensor, sets: Mapping[K, Tensor], kind: str) -> dict[K, Tensor]:
        """Returns d(teacher, set) - d(teacher, again) of every resample, (resamples,) fp64, for each of `sets`.

        Args:
            teacher: (N, D), from noise of its own.
            again: (N, D), the teacher's from the noise of the sets.
            sets: each (N, D).
        """
        everything = [again, *sets.values()]
        samples = self._distances(teacher, self._teacher, everything, kind)
        return {key: samples[:, i] - samples[:, 0] for i, key in enumerate(sets, start=1)}

    def distance(self, real: Tensor, sets: Mapping[K, Tensor], kind: str) -> dict[K, Tensor]:
        """Returns d(real, set) of every resample, (resamples,) fp64. The real pictures (M, D) are not resampled."""
        samples = self._distances(real, None, list(sets.values()), kind)
        return {key: samples[:, i] for i, key in enumerate(sets)}

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean of every resample, (resamples,) fp64, of a figure of each picture (N,): hits, scores."""
        return (self._set @ values.to(self._device, torch.float64) / len(values)).cpu()

    def _distances(self, fixed: Tensor, weights: Tensor | None, sets: list[Tensor], kind: str) -> Tensor:
        """Returns (resamples, sets). Without weights `fixed` is the same in all resamples."""
        for features in sets if weights is None else [fixed, *sets]:
            if len(features) != self._set.shape[1]:
                raise ValueError(f"{len(features)} pictures, and {self._set.shape[1]} captions are resampled")
        if weights is None:
            weights = torch.ones(1, len(fixed), dtype=torch.float64, device=self._device)
        fixed, *sets = (features.to(self._device, torch.float64) for features in (fixed, *sets))
        return named(kind).resampled(fixed, weights, sets, self._set).cpu()


def interval(samples: Tensor, estimate: float, level: float = 0.95) -> tuple[float, float]:
    """Returns (low, high) around the estimate: the quantiles of the samples, moved so that their mean is the estimate.

    Resampled sets have pictures twice and others not at all, hence covariances of less rank: their Frechet distances
    lie above the estimate as those of small sets lie above those of large ones. That is bias, not spread, and the
    spread alone is what another draw of seeds would do to the estimate. The interval therefore is of the figure at
    this number of pictures, not of its limit for infinitely many.
    """
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(samples.double() - samples.double().mean(), tails).tolist()
    return estimate + low, estimate + high


def _weights(captions: Sequence[str], resamples: int, generator: torch.Generator) -> Tensor:
    """Returns (resamples, N) fp64, not negative; each row sums to N, and to n within a caption of n pictures."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, caption in enumerate(captions):
        groups[caption].append(i)
    strata = [indices for indices in groups.values() if len(indices) > 1]
    single = [indices[0] for indices in groups.values() if len(indices) == 1]
    weights = torch.ones(resamples, len(captions), dtype=torch.float64)
    for indices in [*strata, single] if len(single) > 1 else strata:
        count = len(indices)
        drawn = torch.randint(count, (resamples, count - 1), generator=generator)
        times = torch.zeros(resamples, count, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
        weights[:, indices] = times * (count / (count - 1))
    return weights
