"""Confidence intervals: how far a figure would move with other captions of the same kind, drawn from other seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lcmlora.evaluation.measures.distances import Expansion, named

K = TypeVar("K", bound=str)  # the name of a set
LEVEL = 0.95
_NORMAL = 1.959964  # the normal distribution's quantile at LEVEL


@dataclass(frozen=True)
class Resampled:
    """A figure of a drawn set, and how it changes with the weight of each picture.

    drawn: (N,) fp64, of its pictures.
    teacher: (N,) fp64, of the teacher's pictures that it is compared with, if any.
    real: (M,) fp64, of the real pictures that it is compared with, if any, and their captions.
    """

    estimate: float
    drawn: Tensor
    teacher: Tensor | None = None
    real: Tensor | None = None
    real_captions: Sequence[str] = ()


class Bootstrap:
    """Resamples of captions and of pictures, and the figures of each resample.

    Captions are resampled with all their pictures: of C captions, C - 1 are drawn with replacement and count
    C / (C - 1) each (Rao and Wu, JASA 83, 1988). That carries what captions do to a figure and what seeds do. To
    resample the pictures of a resampled caption once more would count the seeds twice (Davison and Hinkley, Bootstrap
    Methods, 1997, section 3.8; `python -m benchmarks.intervals` compares the ways). With few captions the normal
    quantiles are too small, so the samples are spread by those of Student's t of C - 1 degrees of freedom. Where there
    is one caption it cannot be resampled, and its pictures are.

    `seeds=True` resamples pictures within their caption instead: the captions stay, the seeds vary. This measures
    chance between two adapters that drew the same captions. Of n pictures of a caption n - 1 are drawn and count
    n / (n - 1) each. Captions with one picture are resampled as if they were one caption.

    All sets that are compared have the same captions, start picture i from the same noise and have the same resamples,
    so that `a - b` of two results are the resamples of a paired difference. The teacher's set has the same captions and
    other noise.

    A resample is a set of weights (N,). Figures are linear in the weights to first order, and a resample's figure is
    taken to that order (infinitesimal jackknife, Efron 1982): one matrix product for all resamples, and one
    eigendecomposition for each set instead of one for each set and resample. A Frechet distance of resampled pictures
    itself is biased and spreads too far, since resampled covariances lack rank.

    captions, resamples: how many there are.
    widening: of the samples, from the normal distribution's quantiles to those of Student's t.
    """

    def __init__(
        self,
        captions: Sequence[str],
        *,
        resamples: int = 1000,
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
        self._shown = list(captions)
        self._numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        self.captions, self.resamples = len(self._numbers), resamples
        self._seeds_of_teacher = weights_of_seeds(captions, resamples, generator)
        self._seeds = weights_of_seeds(captions, resamples, generator)
        self._times = weights_of(self.captions, resamples, generator) if self.captions > 1 else None
        freedom = self.captions - 1 if self.captions > 1 else len(captions) - 1
        self.widening = student_t(LEVEL, freedom) / _NORMAL

    def excess(self, teacher: Tensor, again: Tensor, sets: Mapping[K, Tensor], kind: str) -> dict[K, Tensor]:
        """Returns d(teacher, set) - d(teacher, again) of every resample, (resamples,) fp64, for each of `sets`.

        Args:
            teacher: (N, D), from noise of its own.
            again: (N, D), the teacher's from the noise of the sets.
            sets: each (N, D).
        """
        return {key: self.samples(found) for key, found in self.expand_excess(teacher, again, sets, kind).items()}

    def distance(
        self, real: Tensor, sets: Mapping[K, Tensor], kind: str, captions: Sequence[str] | None = None
    ) -> dict[K, Tensor]:
        """Returns d(real, set) of every resample, (resamples,) fp64.

        Args:
            real: (M, D).
            sets: each (N, D).
            captions: of the real pictures, which are resampled with those of the sets; without them they are not.
        """
        return {
            key: self.samples(
                Resampled(found.value, found.other)
                if captions is None
                else Resampled(found.value, found.other, real=found.fixed, real_captions=captions)
            )
            for key, found in self._expand(real, sets, kind).items()
        }

    def mean(self, values: Tensor, *, seeds: bool = False) -> Tensor:
        """Returns the mean of every resample, (resamples,) fp64, of a figure of each picture (N,): hits, scores."""
        values = values.to("cpu", torch.float64)
        mean = values.mean()
        return self.samples(Resampled(mean.item(), (values - mean) / len(values)), seeds=seeds)

    def expand_excess(self, teacher: Tensor, again: Tensor, sets: Mapping[K, Tensor], kind: str) -> dict[K, Resampled]:
        """Returns each set's excess, as in `excess`, and how it changes with the weights: for `samples`."""
        self._check(teacher)
        (floor,) = self._expand(teacher, {"again": again}, kind).values()
        return {
            key: Resampled(found.value - floor.value, found.other - floor.other, found.fixed - floor.fixed)
            for key, found in self._expand(teacher, sets, kind).items()
        }

    def samples(self, figure: Resampled, *, seeds: bool = False) -> Tensor:
        """Returns a figure of every resample, (resamples,) fp64, whose quantiles are those of its interval.

        Args:
            seeds: resample the seeds alone.
        """
        self._check(figure.drawn)
        if seeds or self._times is None:
            change = self._seeds @ figure.drawn
            if figure.teacher is not None:
                change = change + self._seeds_of_teacher @ figure.teacher
        else:
            by_caption = self._by_caption(figure.drawn, self._shown)
            if figure.teacher is not None:
                by_caption = by_caption + self._by_caption(figure.teacher, self._shown)
            if figure.real is not None:
                by_caption = by_caption + self._by_caption(figure.real, figure.real_captions)
            change = (self._times - 1) @ by_caption
        return figure.estimate + change * (1.0 if seeds else self.widening)

    def _by_caption(self, changes: Tensor, captions: Sequence[str]) -> Tensor:
        """Returns the sums (C,) over the pictures of each drawn caption; other captions are not resampled."""
        sums = torch.zeros(self.captions + 1, dtype=torch.float64)
        numbers = torch.tensor([self._numbers.get(caption, self.captions) for caption in captions])
        return sums.index_add_(0, numbers, changes)[:-1]

    def _check(self, pictures: Tensor) -> None:
        if len(pictures) != len(self._shown):
            raise ValueError(f"{len(pictures)} pictures, and {len(self._shown)} captions are resampled")

    def _expand(self, fixed: Tensor, sets: Mapping[K, Tensor], kind: str) -> dict[K, Expansion]:
        for features in sets.values():
            self._check(features)
        fixed, *others = (features.to(self._device, torch.float64) for features in (fixed, *sets.values()))
        return dict(zip(sets, named(kind).expand(fixed, others), strict=True))


def interval(samples: Tensor, estimate: float) -> tuple[float, float]:
    """Returns (low, high) around the estimate: the quantiles of the samples, moved so that their mean is the estimate.

    The interval is of the figure at this number of pictures and captions, not of its limit for infinitely many.
    """
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(samples.double() - samples.double().mean(), tails).tolist()
    return estimate + low, estimate + high


def student_t(level: float, freedom: int) -> float:
    """Returns the quantile of Student's t of so many degrees of freedom that holds `level` between minus it and it.

    Integrated here, since SciPy is no dependency of the core.
    """
    angle = np.linspace(0, np.pi / 2, 100_001)  # t = tan(angle) * freedom^1/2, of density cos(angle)^(freedom - 1)
    density = np.cos(angle) ** (freedom - 1)
    share = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.tan(np.interp(level, share / share[-1], angle)) * freedom**0.5)


def weights_of(count: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Returns how often each of `count` units counts, (resamples, count) fp64, each row summing to `count`."""
    drawn = torch.randint(count, (resamples, count - 1), generator=generator)
    times = torch.zeros(resamples, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return times * (count / (count - 1))


def weights_of_seeds(captions: Sequence[str], resamples: int, generator: torch.Generator) -> Tensor:
    """Returns (resamples, N) fp64, not negative; each row sums to N, and to n within a caption of n pictures."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, caption in enumerate(captions):
        groups[caption].append(i)
    strata = [indices for indices in groups.values() if len(indices) > 1]
    single = [indices[0] for indices in groups.values() if len(indices) == 1]
    weights = torch.ones(resamples, len(captions), dtype=torch.float64)
    for indices in [*strata, single] if len(single) > 1 else strata:
        weights[:, indices] = weights_of(len(indices), resamples, generator)
    return weights
