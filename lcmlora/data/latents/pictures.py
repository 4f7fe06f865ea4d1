"""Latents of pictures: read ahead in threads, cropped, and sent through the VAE in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data
from lcmlora.data.latents.aspect import Size
from lcmlora.data.sources.source import Record, fit, open_source
from lcmlora.errors import UserError

_LOGVAR = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution clamps it

T = TypeVar("T")
R = TypeVar("R")
Tensors = dict[str, Tensor]
Loaded = tuple[np.ndarray, tuple[int, int], tuple[int, int]]


@contextmanager
def picture_encoder(
    base: LoadedBase, data: Data, wanted: Iterable[tuple[Record, Size]], batch: int
) -> Iterator[Callable[[list[Record]], Tensors]]:
    """Gives a function from the records of a batch to the rows of a shard (cache.py).

    Args:
        base: with its VAE.
        wanted: all records in the order in which the function will be given them, so that it need not wait for them,
            each with the size in which it is wanted.
        batch: pictures in a call.
    """

    source = open_source(data)

    def load(item: tuple[Record, Size]) -> Loaded:
        record, size = item
        picture = source.picture(record, base.resolution)
        fitted, crop = fit(picture, *size)
        return np.asarray(fitted), (picture.height, picture.width), crop

    with ThreadPoolExecutor(source.readers()) as pool:
        loaded = _ahead(pool, load, wanted, depth=2 * batch)
        try:
            yield lambda records: _encode(base, records, list(islice(loaded, len(records))))
        finally:
            loaded.close()


def _encode(base: LoadedBase, records: list[Record], loaded: list[Loaded]) -> Tensors:
    pixels, sizes, crops = zip(*loaded, strict=True)
    pictures = torch.from_numpy(np.stack(pixels)).to(base.device).permute(0, 3, 1, 2).contiguous()
    mean, logvar = base.encode_pictures(pictures.float().div_(127.5).sub_(1))
    mean = mean.half()
    finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1)
    if not finite.all():
        raise UserError(
            f"{records[int(finite.int().argmin())].key}: its latent is not finite (NaN or infinite); leave the picture "
            f"out, or encode with a VAE in higher precision (now {base.vae.dtype})"
        )
    return {
        "latent_mean": mean.cpu(),
        "latent_logvar": logvar.clamp(*_LOGVAR).half().cpu(),
        "orig_size": torch.tensor(sizes, dtype=torch.int32),
        "crop_tl": torch.tensor(crops, dtype=torch.int32),
    }


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], depth: int
) -> Generator[R, None, None]:
    """Yields function(item) in order, computed in the pool at most `depth` items ahead."""
    source = iter(items)
    waiting = deque(pool.submit(function, item) for item in islice(source, depth))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()
