"""Which rows of which shards a step trains on: a pure function of the seed, the step and the shards' sizes.

Shards are read in an order of each epoch's own, in windows of many shards whose rows are mixed. So training from far
away reads each shard once an epoch and knows which ones are next; and where a run stands is one number, its step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

WINDOW = 1 << 18  # rows that are mixed; of SD-V1.5's latents 17 GB, read once while it lasts

_ROUNDS, _SMALL = 6, 8
_MORE_ROUNDS = 16  # where a half has less than _SMALL bits: few rounds favour some orders of few rows


class Shard(NamedTuple):
    """A file of rows that can stand in one batch.

    bucket: shards of one shape of latents have the same number.
    """

    bucket: int
    rows: int


def permuted(index: Rows, size: int, *key: int) -> Rows:
    """Returns where a permutation of range(size) that belongs to the key takes each index, (N,) int64.

    A Feistel network over the next power of four, walked along its cycles until it is back in the range: no table is
    made, so one row of billions costs as much as one of ten. The same on every machine and with every library.

    Raises:
        ValueError: an index outside of the range.
    """
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"indices from {index.min()} to {index.max()} are not all in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4 * (_ROUNDS if half >= _SMALL else _MORE_ROUNDS)).digest()
    rounds = [np.uint32(word) for word in np.frombuffer(digest, "<u4")]
    result = index.astype(np.int64)
    walking = np.arange(len(result))
    while len(walking):
        result[walking] = _feistel(result[walking], half, rounds)
        walking = walking[result[walking] >= size]
    return result


def _feistel(index: Rows, half: int, rounds: Sequence[np.uint32]) -> Rows:
    mask = np.uint32((1 << half) - 1)
    left, right = (index >> half).astype(np.uint32), index.astype(np.uint32) & mask
    for word in rounds:
        left, right = right, left ^ (_mixed(right ^ word) & mask)
    return (left.astype(np.int64) << half) | right.astype(np.int64)


def _mixed(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Returns a hash of each word: the finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


class Batch(NamedTuple):
    """What a step trains on."""

    bucket: int
    shards: Rows  # (B,) int64, numbers in the table
    rows: Rows  # (B,) int64, of each shard


class Load(NamedTuple):
    """The shards of a window, and the first and the last step that read it."""

    first: int
    last: int
    shards: Rows  # numbers in the table, ascending


class _Line(NamedTuple):
    """The shards of a bucket in an epoch's order, and where in that line the rows of each end."""

    shards: Rows
    stops: Rows

    def at(self, places: Rows) -> tuple[Rows, Rows]:
        """Returns the numbers of the shards in which these rows of the line lie, and how many there are up to each."""
        found = np.searchsorted(self.stops, places, side="right")
        return self.shards[found], self.stops[found]


class _Epoch(NamedTuple):
    bucket: npt.NDArray[np.int32]  # of each batch
    number: Rows  # of each among those of its bucket
    lines: dict[int, _Line]  # by bucket


class Plan:
    """The batches of all epochs.

    A batch is of one bucket. In an epoch no row comes twice, and all come but a remainder, in each bucket less than a
    batch and one row for each lane; another epoch leaves out other rows.
    """

    def __init__(self, seed: int, shards: Sequence[Shard], batch: int, *, lanes: int = 1, window: int = WINDOW) -> None:
        """Args:
        batch: rows of a step over all processes.
        lanes: equal parts into which the rows of an epoch are divided. Of each batch every lane gives its part, in
            order, so that a machine whose processes take one lane's part reads a share of the shards alone.
        window: rows that are mixed, over all lanes; whole batches of them are.

        Raises:
            ValueError: lanes that do not divide the batch, a window below a batch, or fewer rows than a batch in every
                bucket.
        """
        if batch % lanes:
            raise ValueError(f"{lanes} lanes do not divide a batch of {batch}")
        if window < batch:
            raise ValueError(f"a window of {window} rows is less than a batch of {batch}")
        self._seed, self._lanes = seed, lanes
        self._part = batch // lanes  # of a lane
        self._window = window // batch * self._part  # likewise
        self._buckets = np.array([shard.bucket for shard in shards], dtype=np.int32)
        self._rows = np.array([shard.rows for shard in shards], dtype=np.int64)
        totals = np.bincount(self._buckets, self._rows).astype(np.int64)
        self._lane_rows = totals // lanes  # by bucket
        self._labels = np.repeat(np.arange(len(totals), dtype=np.int32), self._lane_rows // self._part)
        self._epoch = lru_cache(2)(self._make)  # a step's and that of what is read ahead
        if not self.steps:
            raise ValueError(f"no bucket has the {batch} rows of a batch; the largest has {totals.max(initial=0)}")

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(self._labels)

    def at(self, step: int) -> Batch:
        """Returns the batch of a step, one lane's part after the other."""
        epoch, bucket, number = self._find(step)
        wanted = np.arange(number * self._part, (number + 1) * self._part)
        lanes = np.arange(self._lanes)[:, None] * self._lane_rows[bucket]
        places = (lanes + self._mixed(wanted, epoch, bucket)).flatten()
        line = self._epoch(epoch).lines[bucket]
        shards, stops = line.at(places)
        return Batch(bucket, shards, places - stops + self._rows[shards])

    def shards(self, step: int, lanes: range | None = None) -> Rows:
        """Returns the numbers of the shards over which the windows of this step are spread, ascending.

        Args:
            lanes: of these lanes; by default of all.
        """
        epoch, bucket, number = self._find(step)
        start = number * self._part // self._window * self._window
        return self._under(epoch, bucket, start, lanes or range(self._lanes))

    def loads(self, epoch: int) -> list[Load]:
        """Returns what the steps of an epoch read, window by window, in the order in which each is begun."""
        made, found = self._epoch(epoch), []
        for bucket in made.lines:
            steps = np.flatnonzero(made.bucket == bucket) + epoch * self.steps
            for first in range(0, len(steps), self._window // self._part):
                last = min(first + self._window // self._part, len(steps)) - 1
                shards = self._under(epoch, bucket, first * self._part, range(self._lanes))
                found.append(Load(int(steps[first]), int(steps[last]), shards))
        return sorted(found, key=lambda load: load.first)

    def _under(self, epoch: int, bucket: int, start: int, lanes: range) -> Rows:
        """Returns the numbers of the shards below the window that begins at this row of each of the lanes."""
        size, line = int(self._lane_rows[bucket]), self._epoch(epoch).lines[bucket]
        ends = np.array([start, min(start + self._window, size) - 1])
        found = []
        for lane in lanes:
            first, last = np.searchsorted(line.stops, ends + lane * size, side="right")
            found.append(line.shards[first : last + 1])
        return np.unique(np.concatenate(found))

    def _find(self, step: int) -> tuple[int, int, int]:
        """Returns a step's epoch, its bucket, and how many of that bucket's batches came before it in the epoch."""
        epoch, place = divmod(step, self.steps)
        made = self._epoch(epoch)
        return epoch, int(made.bucket[place]), int(made.number[place])

    def _make(self, epoch: int) -> _Epoch:
        order = self._labels[permuted(np.arange(self.steps), self.steps, self._seed, epoch)]
        number = np.empty(self.steps, np.int64)
        lines = {}
        for bucket in map(int, np.unique(order)):
            mine = np.flatnonzero(order == bucket)
            number[mine] = np.arange(len(mine))
            shards = np.flatnonzero((self._buckets == bucket) & (self._rows > 0))
            shards = shards[permuted(np.arange(len(shards)), len(shards), self._seed, epoch, bucket)]
            lines[bucket] = _Line(shards, self._rows[shards].cumsum())
        return _Epoch(order, number, lines)

    def _mixed(self, wanted: Rows, epoch: int, bucket: int) -> Rows:
        """Returns where in its lane each of these rows lies, mixed with the others of its window. Lanes share it: their
        rows are strangers anyway."""
        size = int(self._lane_rows[bucket])
        places = np.empty_like(wanted)
        for window in map(int, np.unique(wanted // self._window)):
            here = wanted // self._window == window
            start = window * self._window
            length = min(self._window, size - start)
            places[here] = start + permuted(wanted[here] - start, length, self._seed, epoch, bucket, window)
        return places
