"""The combination of adapters: theta' = theta_pre + lambda1 tau_style + lambda2 tau_LCM, eq. (3) of arXiv 2311.05556.

A layer's sum of products is one product of the factors side by side, so the sum is an adapter of summed rank, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lcmlora.adapters.formats import Adapter, Layer
from lcmlora.adapters.metadata import Truncation
from lcmlora.errors import UserError


def combine_adapters(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Returns the weighted sum of adapters of one base. Its rank is the sum of their ranks, and its scale is 1.

    Args:
        parts: the adapters with their weights.

    Raises:
        UserError: a layer has different sizes in two adapters.
    """
    names = sorted({name for adapter, _ in parts for name in adapter.layers})
    layers = {}
    for name in names:
        having = [(adapter, weight) for adapter, weight in parts if name in adapter.layers]
        downs = [adapter.layers[name].down.float() for adapter, _ in having]
        ups = [weight * adapter.layers[name].folded.up.float() for adapter, weight in having]
        for (adapter, _), down, up in zip(having, downs, ups, strict=True):
            if down.shape[1:] != downs[0].shape[1:] or up.shape[0] != ups[0].shape[0]:
                raise UserError(
                    f"{adapter.source}: {name} takes {_size(down, up)}, and in {having[0][0].source} it takes "
                    f"{_size(downs[0], ups[0])}: they were made for different bases"
                )
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        layers[name] = Layer(down, up, float(down.shape[0]))
    dtype = reduce(torch.promote_types, (adapter.dtype for adapter, _ in parts))
    return Adapter(" + ".join(f"{weight:g} {adapter.source}" for adapter, weight in parts), layers, dtype)


def _size(down: Tensor, up: Tensor) -> str:
    return f"{tuple(down.shape[1:])} to {up.shape[0]}"


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, Truncation]:
    """Returns the adapter with each layer's best approximation of this rank (Eckart-Young), and the error.

    A layer of smaller rank keeps its own. With B = Q_b R_b and A^T = Q_a R_a, the singular values of B A are those of
    R_b R_a^T, a matrix that is only as large as the rank; they are split evenly between the two factors.
    """
    layers, lost, total = {}, {}, {}  # the last two: sums of squared singular values
    for name, layer in adapter.layers.items():
        b = layer.folded.up.double().flatten(1)  # (out, r)
        a = layer.down.double().flatten(1)  # (r, in * kh * kw)
        (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        up, down = qb @ u[:, :kept] * root, root[:, None] * (vh[:kept] @ qa.T)
        layers[name] = Layer(
            down.float().reshape(kept, *layer.down.shape[1:]),
            up.float().reshape(len(b), kept, *layer.up.shape[2:]),
            float(kept),
        )
        lost[name], total[name] = s[kept:].square().sum().item(), s.square().sum().item()
    shares = {name: (lost[name] / total[name]) ** 0.5 if total[name] else 0.0 for name in lost}
    worst = max(shares, key=lambda name: shares[name])
    overall = (sum(lost.values()) / (sum(total.values()) or 1)) ** 0.5
    truncation = Truncation(rank=rank, overall=overall, worst=shares[worst], worst_layer=worst)
    return Adapter(adapter.source, layers, adapter.dtype), truncation


def check_weights(option: str, *weights: float) -> None:
    """Raises UserError if a weight is not a finite number.

    Args:
        option: the option of the command line that has the weights, for the error.
    """
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"{option}: expected finite numbers, got {weight:g}")
