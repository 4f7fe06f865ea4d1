"""The latents of one shard, which workers make: of pictures by the VAE, of prompts by the teacher (rollouts.py).

Threads read and crop the pictures ahead, those of the next shard as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data, Rollouts
from lcmlora.data.latents.aspect import Size
from lcmlora.data.latents.cache import Tensors
from lcmlora.data.latents.remote_shards import ShardFile
from lcmlora.data.latents.rollouts import RolloutEncoder
from lcmlora.data.latents.store import ShardWriter
from lcmlora.data.sources.source import Record, Source, fit, open_source
from lcmlora.errors import UserError

_LOGVAR = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution clamps it


@dataclass(frozen=True)
class Shard:
    """What a shard is made of.

    made_of: SHA-256 of the rest.
    size: to which the pictures are cropped.
    text_rows: the rows of the records' captions in the cache's file of captions.
    """

    name: str
    made_of: str
    size: Size
    records: list[Record]
    text_rows: list[int]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MakeShardEncoder:
    """Makes a shard encoder where the shards are to be encoded.

    load: loads the base there, with its VAE, or for rollouts with its network and text encoders.
    dtype: that the base must have.
    rollouts: how the teacher draws the latents, if there are no pictures.
    batch: pictures in a forward.
    after_batch: called after each.
    """

    load: Callable[[], LoadedBase]
    dtype: torch.dtype
    data: Data
    rollouts: Rollouts | None
    batch: int
    writer: ShardWriter
    after_batch: Callable[[], None] | None = None

    def __call__(self) -> ShardEncoder:
        """Raises UserError if the base is loaded in another precision here, so that it would make other latents."""
        base = self.load()
        if base.dtype != self.dtype:
            raise UserError(
                f"{base.name}: a worker would encode in {base.dtype} on its {base.device.type}, and the captions were "
                f"encoded in {self.dtype}; use workers with the same kind of device as the machine that starts them"
            )
        return ShardEncoder(base, self)


class ShardEncoder:
    """A function that makes a shard and writes it, and returns what ShardWriter does."""

    def __init__(self, base: LoadedBase, settings: MakeShardEncoder) -> None:
        self._settings = settings
        self._rollouts = RolloutEncoder(base, settings.rollouts) if settings.rollouts else None
        self._pictures = None if settings.rollouts else _PictureEncoder(base, settings.data, 2 * settings.batch)
        self._reading: dict[str, Iterator[_Crop]] = {}

    def expect(self, shard: Shard) -> None:
        """Begins to read the pictures of a shard."""
        if self._pictures:
            self._reading[shard.name] = self._pictures.read(shard)

    def __call__(self, shard: Shard) -> tuple[ShardFile, Tensors]:
        """Raises UserError if a picture has changed, or a latent is not finite."""
        size, parts = self._settings.batch, []
        crops = self._reading.pop(shard.name, iter(()))
        for start in range(0, len(shard.records), size):
            records = shard.records[start : start + size]
            if self._pictures:
                part = self._pictures.encode(records, list(islice(crops, len(records))))
            else:
                assert self._rollouts
                part = self._rollouts(records)
            part["key"] = torch.tensor([list(bytes.fromhex(r.sha256)[:16]) for r in records], dtype=torch.uint8)
            part["text_row"] = torch.tensor(shard.text_rows[start : start + size], dtype=torch.int32)
            parts.append(part)
            if self._settings.after_batch:
                self._settings.after_batch()
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._settings.writer.write(shard.name, tensors, shard.made_of)


class _Crop(NamedTuple):
    """A cropped picture.

    pixels: (height, width, 3) uint8.
    original_size: height and width of the picture before.
    corner: top and left of the crop in the resized picture.
    """

    pixels: npt.NDArray[np.uint8]
    original_size: tuple[int, int]
    corner: tuple[int, int]


class _PictureEncoder:
    """The VAE, and threads that read pictures for it."""

    def __init__(self, base: LoadedBase, data: Data, ahead: int) -> None:
        """Args:
        ahead: pictures of a shard that are read before they are asked for.
        """
        self._base, self._ahead = base, ahead
        self._source = open_source(data)
        self._threads = ThreadPoolExecutor(self._source.readers())

    def read(self, shard: Shard) -> Iterator[_Crop]:
        """Begins to read the pictures of a shard, and returns them in order."""
        load = partial(_load, self._source, self._base.resolution, shard.size)
        coming = (self._threads.submit(load, record) for record in shard.records)
        return _in_order(deque(islice(coming, self._ahead)), coming)

    def encode(self, records: list[Record], crops: list[_Crop]) -> Tensors:
        """Returns the rows of a shard (cache.py) of these pictures. Raises UserError if a latent is not finite."""
        pixels, sizes, corners = zip(*crops, strict=True)
        pictures = torch.from_numpy(np.stack(pixels)).to(self._base.device).permute(0, 3, 1, 2).contiguous()
        mean, logvar = self._base.encode_pictures(pictures.float().div_(127.5).sub_(1))
        mean = mean.half()
        finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1)
        if not finite.all():
            raise UserError(
                f"{records[int(finite.int().argmin())].key}: its latent is not finite (NaN or infinite); leave the "
                f"picture out, or encode with a VAE in higher precision (now {self._base.vae.dtype})"
            )
        return {
            "latent_mean": mean.cpu(),
            "latent_logvar": logvar.clamp(*_LOGVAR).half().cpu(),
            "orig_size": torch.tensor(sizes, dtype=torch.int32),
            "crop_tl": torch.tensor(corners, dtype=torch.int32),
        }


def _load(source: Source, resolution: int, size: Size, record: Record) -> _Crop:
    picture = source.picture(record, resolution)
    cropped, corner = fit(picture, *size)
    return _Crop(np.asarray(cropped), (picture.height, picture.width), corner)


def _in_order(begun: deque[Future[_Crop]], coming: Iterator[Future[_Crop]]) -> Iterator[_Crop]:
    """Yields the results of futures; begins another one for each."""
    try:
        while begun:
            result = begun.popleft().result()
            begun.extend(islice(coming, 1))
            yield result
    finally:
        for future in begun:
            future.cancel()
