"""Whether prompts of production are distributed like the training captions: a two-sample test on text embeddings.

The distance is the squared maximum mean discrepancy with a Gaussian kernel, its unbiased estimate (Gretton et al., "A
Kernel Two-Sample Test", JMLR 13, 2012, Lemma 6), and the kernel's width is the median distance of captions. Its
distribution where nothing has drifted comes from the captions themselves: again and again some of them are held out, as
many as there are prompts, and compared with others. So drift is said of undrifted prompts at a known rate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcmlora.bases.base import LoadedBase
from lcmlora.errors import UserError
from lcmlora.progress import track

FEWEST = 50  # prompts, and captions beside those that are held out
_MOST_PROMPTS = 500
_MOST_CAPTIONS = 1500
_BATCH = 16
_DRAWS = 1999  # of captions that are held out: a p-value is a multiple of 1 / 2000


class TooFew(UserError):
    """There are too few prompts or captions to compare."""


@dataclass(frozen=True)
class Drift:
    """The result of a comparison.

    distance: squared MMD of prompts and captions; 0 where they are distributed alike, negative by chance.
    threshold: that it has passed where prompts have drifted.
    p_value: how often held-out captions are as far from the others as the prompts, or farther.
    alarms: the share of comparisons that say drift of prompts that are like the captions.
    prompts, captions: how many distinct texts were compared.
    """

    distance: float
    threshold: float
    p_value: float
    alarms: float
    prompts: int
    captions: int

    @property
    def drifted(self) -> bool:
        """Whether the prompts are farther from the captions than chance explains."""
        return self.p_value <= self.alarms


def chosen(texts: Iterable[str], most: int) -> list[str]:
    """Returns at most so many distinct texts: the same ones each time, and a fair sample of all."""
    distinct = {text.strip() for text in texts} - {""}
    return sorted(distinct, key=lambda text: hashlib.sha256(text.encode()).digest())[:most]


def measure(base: LoadedBase, captions: Sequence[str], prompts: Sequence[str], alarms: float) -> Drift:
    """Returns how the prompts are distributed beside the captions. Each distinct text counts once.

    Args:
        base: with its text encoders.
        captions: all that pictures were prepared with; none of the prompts.
        alarms: the share of comparisons that say drift by chance alone.

    Raises:
        TooFew: to tell drift from chance.
    """
    known, asked = chosen(captions, _MOST_CAPTIONS), chosen(prompts, _MOST_PROMPTS)
    for name, found, fewest in (("prompts", asked, FEWEST), ("captions", known, 2 * FEWEST)):
        if len(found) < fewest:
            raise TooFew(f"{len(found)} distinct {name} are too few to compare; expected {fewest} or more")
    asked = asked[: len(known) // 2]
    vectors = embed(base, [*known, *asked])
    return compare(vectors[: len(known)], vectors[len(known) :], alarms)


def embed(base: LoadedBase, texts: Sequence[str]) -> Tensor:
    """Returns a vector for each text, (N, D) fp64 on the CPU: the mean of its tokens' embeddings, and pooled ones."""
    rows = []
    for start in track(range(0, len(texts), _BATCH), "encode texts", unit=_BATCH):
        conditioning = base.encode_text(list(texts[start : start + _BATCH]))
        vectors = [value.flatten(1, -2).mean(1) if value.ndim > 2 else value for value in conditioning.values()]
        rows.append(torch.cat([vector.double().cpu() for vector in vectors], dim=1))
    found = torch.cat(rows)
    if not found.isfinite().all():
        raise UserError(f"the text encoders of {base.folder} give numbers that are not finite")
    return found


def compare(captions: Tensor, prompts: Tensor, alarms: float, *, draws: int = _DRAWS, seed: int = 0) -> Drift:
    """Returns how prompts (M, D) are distributed beside captions (N, D), both fp64.

    Args:
        alarms: the share of comparisons that say drift by chance alone.
        draws: of M captions that are held out and compared with others.

    Raises:
        ValueError: fewer than 2 M captions.
    """
    count, held_out = len(captions), len(prompts)
    if count < 2 * held_out:
        raise ValueError(f"expected {2 * held_out} captions or more for {held_out} prompts, got {count}")
    kernel = _kernel(torch.cat([captions, prompts]), captions)
    generator = torch.Generator().manual_seed(seed)
    null = torch.empty(draws, dtype=torch.float64)
    rows = kernel[:count, :count].sum(1)
    for number in range(draws):
        null[number] = _held_out_discrepancy(kernel, rows, torch.randperm(count, generator=generator)[:held_out])
    reference = torch.randperm(count, generator=generator)[held_out:]
    distance = _discrepancy(kernel, reference, torch.arange(count, count + held_out)).item()
    # With the comparison itself among them, the rate of false alarms is at most `alarms` (Phipson and Smyth, 2010).
    p_value = (1 + int((null >= distance).sum())) / (draws + 1)
    allowed = math.floor(alarms * (draws + 1))  # of the comparisons, that are as far or farther
    threshold = null.sort(descending=True).values[max(0, allowed - 1)].item()
    return Drift(distance, threshold, p_value, alarms, held_out, count)


def _kernel(vectors: Tensor, captions: Tensor) -> Tensor:
    """Returns the Gaussian kernel of all pairs; its width is the median distance of different captions."""
    squares = torch.cdist(vectors, vectors).square()
    pairs = squares[: len(captions), : len(captions)]
    above = pairs[torch.triu(torch.ones_like(pairs, dtype=torch.bool), diagonal=1)]
    width = above[above > 0].median() if (above > 0).any() else torch.tensor(1.0, dtype=vectors.dtype)
    return torch.exp(-squares / width)


def _held_out_discrepancy(kernel: Tensor, rows: Tensor, second: Tensor) -> Tensor:
    """Returns `_discrepancy` () of some captions from all others, by the sums of the captions' kernel."""
    m, n = len(second), len(rows) - len(second)
    inside, touching = kernel[second][:, second].sum(), rows[second].sum()
    within_first = (rows.sum() - 2 * touching + inside - n) / (n * (n - 1))
    within_second = (inside - m) / (m * (m - 1))
    return within_first + within_second - 2 * (touching - inside) / (n * m)


def _discrepancy(kernel: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns the unbiased estimate of the squared MMD () of two sets of rows, which share none."""
    n, m = len(first), len(second)
    within_first = (kernel[first][:, first].sum() - n) / (n * (n - 1))  # the kernel of a row with itself is 1
    within_second = (kernel[second][:, second].sum() - m) / (m * (m - 1))
    return within_first + within_second - 2 * kernel[first][:, second].mean()
