"""Which pictures a step sees, and all its random numbers, as a pure function of the seed and the place in the stream.

The stream of samples is the same on any number of processes and after any interruption; so a run's position in it is
its step, and no generator has a state to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcmlora.bases.families import Conditioning
from lcmlora.config import Training
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.sampling_plan import Plan, Shard
from lcmlora.diffusion.noise import generator
from lcmlora.parallel.ranks import Ranks

_GOLDEN = 0.6180339887498949
_SILVER = 0.4142135623730951


@dataclass
class Batch:
    """Samples and all their randomness, on the device."""

    places: range  # in the stream
    z: Tensor  # (B, C, h, w) clean latents, drawn anew from the VAE's posterior
    noise: Tensor  # (B, C, h, w)
    index: Tensor  # (B,) int64, rows of the solver's grid
    w: Tensor  # (B,) guidance in the papers' convention
    u: Tensor  # (B, 2) uniform numbers for the objective
    conditioning: Conditioning
    # Where the noisy states are not z with noise:
    # (2, B, C, h, w) of the teacher's own run, the states at `index` and a step further; z and noise then have no rows
    pair: Tensor | None = None
    stops: Tensor | None = None  # (J, B) int64, the rows of the grid at which the student's own run halts, then `index`
    fresh: Tensor | None = None  # (J, B, C, h, w) noise that it takes up there


def split(cache: LatentCache, settings: Training) -> tuple[Tensor, Tensor]:
    """Returns the rows to train on and those to validate with, both (N,) int64, ascending.

    Whole captions are kept from training, as many as make up `validation_pictures` or a tenth of the cache; where all
    pictures have one caption, pictures.
    """
    wanted = min(settings.validation_pictures, max(1, len(cache) // 10))
    groups = cache.captions()
    if int(groups.max()) == 0:
        groups = torch.arange(len(cache))
    order = torch.randperm(int(groups.max()) + 1, generator=generator("validation", settings.seed))
    sizes = torch.bincount(groups, minlength=len(order))[order]
    taken = int((sizes.cumsum(0) < wanted).sum()) + 1
    held = torch.isin(groups, order[: min(taken, len(order) - 1)])
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def chunks(cache: LatentCache, rows: Tensor, size: int) -> list[Tensor]:
    """Returns the rows (N,) in parts of at most `size`, each of one bucket."""
    bucket = cache.bucket(rows)
    return [part for number in bucket.unique() for part in rows[bucket == number].split(size)]


class Batches:
    """The stream of samples over these rows of the cache, and this process's part of every step."""

    def __init__(
        self,
        cache: LatentCache,
        rows: Tensor,
        settings: Training,
        device: torch.device,
        ranks: Ranks | None = None,
        *,
        grid: int,
        guidance: tuple[float, float] = (0.0, 0.0),
        trajectory: float = 0.0,
        rollout: float = 0.0,
    ) -> None:
        """Args:
        rows: (N,) int64, of the cache.
        grid: how many timesteps `index` chooses from.
        guidance: the range of w.
        trajectory, rollout: shares of the steps that have states of the teacher's run, and of the student's.
        """
        self._cache = cache
        self._candidates = rows
        self._settings = settings
        self._device = device
        self._ranks = ranks or Ranks()
        self._grid, self._guidance = grid, guidance
        self._trajectory, self._rollout = trajectory, rollout
        self._unconditional = cache.unconditional()
        self._offset = torch.rand((), dtype=torch.float64, generator=generator("offset", settings.seed))
        self._step, self._order = -1, torch.empty(0, dtype=torch.long)

    @property
    def size(self) -> int:
        """Samples in one forward of this process."""
        return self._settings.batch // (self._ranks.size * self._settings.accumulate)

    def positions(self, step: int, part: int) -> range:
        """Returns the places in the stream of this process's `part`-th forward of a step."""
        start = step * self._settings.batch + (self._ranks.rank * self._settings.accumulate + part) * self.size
        return range(start, start + self.size)

    def rows(self, positions: range) -> Tensor:
        """Returns rows of the cache (B,) int64 for places of one step: what the plan says of it."""
        step, start = divmod(positions.start, self._settings.batch)
        if step != self._step:
            plan = self._plan
            self._cache.reach(step)
            batch = plan.at(step)
            first = self._counts.cumsum(0) - self._counts
            order = first[torch.from_numpy(batch.shards)] + torch.from_numpy(batch.rows)
            self._step, self._order = step, self._candidates[order]
        return self._order[start : start + len(positions)]

    @cached_property
    def _counts(self) -> Tensor:
        """How many of the candidates each shard has."""
        return self._cache.shards(self._candidates).bincount()

    @cached_property
    def _plan(self) -> Plan:
        s = self._settings
        shards = [Shard(self._cache.bucket_of_shard(i), n) for i, n in enumerate(self._counts.tolist())]
        plan = Plan(s.seed, shards, s.batch, window=s.window)
        self._cache.follow(plan, s.batch, s.window)
        return plan

    def names(self, rows: Tensor) -> list[str]:
        """Returns the file names of the pictures in these rows of the cache, for messages."""
        return self._cache.names(rows)

    def draw(self, step: int, part: int = 0) -> Batch:
        """Returns the samples of this process's `part`-th forward of a step."""
        positions = self.positions(step, part)
        rows = self.rows(positions)
        # Spread evenly over the steps, as places are over the grid, by another number of that kind.
        kind = (step * _SILVER + float(self._offset)) % 1
        batch = self.at(positions, rows, noised=kind >= self._trajectory)
        if kind < self._trajectory:
            batch.pair = self._cache.states(rows, self._index(positions)).to(self._device)
        elif kind < self._trajectory + self._rollout:
            self._add_run(batch, halts=step % 2)
        return batch

    def _index(self, positions: range) -> Tensor:
        # Places follow each other by the golden ratio: each is uniform by itself, and however many make a step, they
        # lie evenly over the grid, so that its loss hardly depends on the draw.
        even = (torch.arange(positions.start, positions.stop, dtype=torch.float64) * _GOLDEN + self._offset) % 1
        return (even * self._grid).long()

    def _add_run(self, batch: Batch, halts: int) -> None:
        """Says where the student's own run to these samples' timesteps ends, and where it halts before."""
        generators = [generator("run", self._settings.seed, position) for position in batch.places]
        index, last = self._index(batch.places), self._grid - 1
        stops, fresh = [index], []
        for _ in range(halts):
            above = torch.stack([torch.rand((), generator=g) for g in generators])
            stops.insert(0, (stops[0] + 1 + (above * (last - stops[0])).long()).clamp(max=last))
        for _ in stops:
            fresh.append(torch.stack([torch.randn(batch.noise.shape[1:], generator=g) for g in generators]))
        batch.stops = torch.stack(stops).to(self._device)
        batch.fresh = torch.stack(fresh).to(self._device)

    def at(self, positions: range, rows: Tensor, *, noised: bool = True) -> Batch:
        """Returns these rows with the random numbers of these places; with `noised` off without z and noise."""
        s, (w_min, w_max) = self._settings, self._guidance
        # Drawn on the CPU, so that a GPU trains on the very same numbers; each place has its own.
        generators = [generator("sample", s.seed, position) for position in positions]
        z = noise = torch.empty(0, *self._cache.latent_shape)
        if noised:
            mean, logvar = self._cache.latents(rows)
            spread, noise = (
                torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
                for _ in ("posterior", "noise")
            )
            z = mean + (0.5 * logvar).exp() * spread
        u = torch.stack([torch.rand(4, generator=g) for g in generators])
        conditioning = self._cache.conditioning(rows)
        empty = u[:, 1] < s.empty_prompts
        for name, value in self._unconditional.items():
            conditioning[name][empty] = value.to(conditioning[name].device)
        batch = Batch(
            places=positions,
            z=z,
            noise=noise,
            index=self._index(positions),
            w=w_min + (w_max - w_min) * u[:, 0],
            u=u[:, 2:],
            conditioning=conditioning,
        )
        moved = {name: value.to(self._device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        return Batch(positions, **moved, conditioning={k: v.to(self._device) for k, v in conditioning.items()})
