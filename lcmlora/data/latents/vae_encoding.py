"""Latents of pictures: threads read and crop the pictures ahead, and the VAE encodes them in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
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


class _Crop(NamedTuple):
    """A cropped picture.

    pixels: (height, width, 3) uint8.
    original_size: height and width of the picture before.
    corner: top and left of the crop in the resized picture.
    """

    pixels: npt.NDArray[np.uint8]
    original_size: tuple[int, int]
    corner: tuple[int, int]


@contextmanager
def picture_encoder(
    base: LoadedBase, data: Data, records: Iterable[tuple[Record, Size]], batch: int
) -> Iterator[Callable[[list[Record]], Tensors]]:
    """Gives a function from the records of a batch to the rows of a shard (cache.py).

    Args:
        base: with its VAE.
        records: all records, in the order in which the function will get them, so that their pictures are read ahead;
            each with the size that it is cropped to.
        batch: pictures in a call.
    """

    source = open_source(data)

    def load(item: tuple[Record, Size]) -> _Crop:
        record, size = item
        picture = source.picture(record, base.resolution)
        cropped, corner = fit(picture, *size)
        return _Crop(np.asarray(cropped), (picture.height, picture.width), corner)

    with ThreadPoolExecutor(source.readers()) as pool:
        crops = _ahead(pool, load, records, depth=2 * batch)
        try:
            yield lambda of_batch: _encode(base, of_batch, list(islice(crops, len(of_batch))))
        finally:
            crops.close()


def _encode(base: LoadedBase, records: list[Record], crops: list[_Crop]) -> Tensors:
    pixels, sizes, corners = zip(*crops, strict=True)
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
        "crop_tl": torch.tensor(corners, dtype=torch.int32),
    }


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], depth: int
) -> Generator[R, None, None]:
    """Yields function(item) for each item in order; the pool computes up to `depth` results ahead."""
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
