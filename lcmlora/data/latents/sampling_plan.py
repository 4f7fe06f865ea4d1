"""Which rows of which shards a step trains on: a pure function of the seed, the step and the shards' sizes.

Each epoch reads the shards in an order of its own, through a window: the rows of many shards, which are mixed. So a run
that downloads its shards reads each one once an epoch and knows which ones come next, and the state of a run is one
number, its step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

WINDOW = 1 << 18  # rows that are mixed; 17 GB of latents of Stable Diffusion 1.5

_ROUNDS = 6  # of the Feistel network
_SMALL_HALF = 8  # bits of half an index
_SMALL_ROUNDS = 16  # if a half has less than _SMALL_HALF bits: few rounds favour some orders of few rows


class Shard(NamedTuple):
    """A file of rows.

    bucket: the number of the shape of its latents; a batch has rows of one shape.
    """

    bucket: int
    rows: int


def permuted(index: Rows, size: int, *key: int) -> Rows:
    """Returns the images (N,) int64 of the indices (N,) under a permutation of range(size), which the key selects.

    It is a Feistel network over the next power of four, applied until the result is in the range (cycle walking). There
    is no table, so an index in a range of billions costs as much as one in a range of ten. The result is the same on
    every machine and with every version of numpy.

    Raises:
        ValueError: an index outside of the range.
    """
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"indices from {index.min()} to {index.max()} are not all in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(
        repr(key).encode(), digest_size=4 * (_ROUNDS if half >= _SMALL_HALF else _SMALL_ROUNDS)
    ).digest()
    rounds = [np.uint32(word) for word in np.frombuffer(digest, "<u4")]
    result = index.astype(np.int64)
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _feistel(result[outside], half, rounds)
        outside = outside[result[outside] >= size]
    return result


def _feistel(index: Rows, half: int, rounds: Sequence[np.uint32]) -> Rows:
    mask = np.uint32((1 << half) - 1)
    left, right = (index >> half).astype(np.uint32), index.astype(np.uint32) & mask
    for word in rounds:
        left, right = right, left ^ (_hashed(right ^ word) & mask)
    return (left.astype(np.int64) << half) | right.astype(np.int64)


def _hashed(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Returns a hash of each word: the finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


class RowBatch(NamedTuple):
    """The rows of one step."""

    bucket: int
    shards: Rows  # (B,) int64, the number of each row's shard
    rows: Rows  # (B,) int64, each row's number in its shard


class Window(NamedTuple):
    """The shards of one window, and the first and the last step that read it."""

    first: int
    last: int
    shards: Rows  # numbers of the shards, ascending


class _ShardOrder(NamedTuple):
    """A bucket's shards in the order of one epoch. Their rows, one shard after the other, are numbered through.

    stops: for each shard, the number of rows up to its end.
    """

    shards: Rows
    stops: Rows

    def locate(self, positions: Rows) -> tuple[Rows, Rows]:
        """Returns the shard of each of these rows, and the number of rows up to that shard's end."""
        index = np.searchsorted(self.stops, positions, side="right")
        return self.shards[index], self.stops[index]


class _Epoch(NamedTuple):
    """The batches of one epoch.

    bucket: of each batch.
    number: of each batch, counted within its bucket.
    orders: the order of the shards, by bucket.
    """

    bucket: npt.NDArray[np.int32]
    number: Rows
    orders: dict[int, _ShardOrder]


class SamplingPlan:
    """The batches of all epochs.

    All rows of a batch are of one bucket. In an epoch no row comes twice, and all rows come but a remainder: in each
    bucket less than a batch and one row for each lane. Another epoch leaves out other rows.
    """

    def __init__(self, seed: int, shards: Sequence[Shard], batch: int, *, lanes: int = 1, window: int = WINDOW) -> None:
        """Args:
        batch: rows of a step over all processes.
        lanes: equal parts into which the rows of an epoch are divided. Each batch has an equal part of every lane, in
            their order, so a machine whose processes take the parts of one lane reads only some of the shards.
        window: rows that are mixed, over all lanes, rounded down to whole batches.

        Raises:
            ValueError: lanes that do not divide the batch, a window below a batch, or fewer rows than a batch in every
                bucket.
        """
        if batch % lanes:
            raise ValueError(f"{lanes} lanes do not divide a batch of {batch}")
        if window < batch:
            raise ValueError(f"a window of {window} rows is less than a batch of {batch}")
        self._seed, self._lanes = seed, lanes
        self._part = batch // lanes  # rows of one lane in a batch
        self._window = window // batch * self._part  # rows of one lane in a window
        self._buckets = np.array([shard.bucket for shard in shards], dtype=np.int32)
        self._rows = np.array([shard.rows for shard in shards], dtype=np.int64)
        totals = np.bincount(self._buckets, self._rows).astype(np.int64)
        self._lane_rows = totals // lanes  # rows of one lane, by bucket
        self._bucket_of_batch = np.repeat(np.arange(len(totals), dtype=np.int32), self._lane_rows // self._part)
        self._epoch = lru_cache(2)(self._make_epoch)  # that of the step, and the next one, which is read ahead
        if not self.steps:
            raise ValueError(f"no bucket has the {batch} rows of a batch; the largest has {totals.max(initial=0)}")

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return len(self._bucket_of_batch)

    def batch(self, step: int) -> RowBatch:
        """Returns the rows of a step, one lane's part after the other."""
        epoch, bucket, number = self._locate(step)
        part = np.arange(number * self._part, (number + 1) * self._part)
        lane_starts = np.arange(self._lanes)[:, None] * self._lane_rows[bucket]
        positions = (lane_starts + self._shuffled(part, epoch, bucket)).flatten()
        shards, stops = self._epoch(epoch).orders[bucket].locate(positions)
        return RowBatch(bucket, shards, positions - stops + self._rows[shards])

    def shards(self, step: int, lanes: range | None = None) -> Rows:
        """Returns the numbers of the shards that have rows in the windows of this step, ascending.

        Args:
            lanes: the lanes whose windows are meant; by default all.
        """
        epoch, bucket, number = self._locate(step)
        start = number * self._part // self._window * self._window
        return self._window_shards(epoch, bucket, start, lanes or range(self._lanes))

    def windows(self, epoch: int) -> list[Window]:
        """Returns the windows of an epoch, sorted by the first step that reads each."""
        batches, windows = self._epoch(epoch), []
        for bucket in batches.orders:
            steps = np.flatnonzero(batches.bucket == bucket) + epoch * self.steps
            for first in range(0, len(steps), self._window // self._part):
                last = min(first + self._window // self._part, len(steps)) - 1
                shards = self._window_shards(epoch, bucket, first * self._part, range(self._lanes))
                windows.append(Window(int(steps[first]), int(steps[last]), shards))
        return sorted(windows, key=lambda window: window.first)

    def _window_shards(self, epoch: int, bucket: int, start: int, lanes: range) -> Rows:
        """Returns the numbers of the shards of the window that begins at row `start` of each of the lanes."""
        lane_rows, order = int(self._lane_rows[bucket]), self._epoch(epoch).orders[bucket]
        ends = np.array([start, min(start + self._window, lane_rows) - 1])
        shards = []
        for lane in lanes:
            first, last = np.searchsorted(order.stops, ends + lane * lane_rows, side="right")
            shards.append(order.shards[first : last + 1])
        return np.unique(np.concatenate(shards))

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Returns a step's epoch, its bucket, and the number of its batch within that bucket and epoch."""
        epoch, index = divmod(step, self.steps)
        batches = self._epoch(epoch)
        return epoch, int(batches.bucket[index]), int(batches.number[index])

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = self._bucket_of_batch[permuted(np.arange(self.steps), self.steps, self._seed, epoch)]
        number = np.empty(self.steps, np.int64)
        orders = {}
        for bucket in map(int, np.unique(order)):
            of_bucket = np.flatnonzero(order == bucket)
            number[of_bucket] = np.arange(len(of_bucket))
            shards = np.flatnonzero((self._buckets == bucket) & (self._rows > 0))
            shards = shards[permuted(np.arange(len(shards)), len(shards), self._seed, epoch, bucket)]
            orders[bucket] = _ShardOrder(shards, self._rows[shards].cumsum())
        return _Epoch(order, number, orders)

    def _shuffled(self, positions: Rows, epoch: int, bucket: int) -> Rows:
        """Returns the positions (N,) in a lane after each window was shuffled. All lanes use the same permutation, as
        their rows have nothing in common anyway."""
        lane_rows = int(self._lane_rows[bucket])
        shuffled = np.empty_like(positions)
        for window in map(int, np.unique(positions // self._window)):
            inside = positions // self._window == window
            start = window * self._window
            length = min(self._window, lane_rows - start)
            shuffled[inside] = start + permuted(positions[inside] - start, length, self._seed, epoch, bucket, window)
        return shuffled
