"""The samples of a step: pictures and random numbers, as a pure function of the seed and the sample index.

The sample index numbers the samples of a run: step n has those from n * batch on. The stream of samples is the same on
any number of processes and after any interruption, so a run continues from its step alone, without a generator's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lcmlora.bases.families import Conditioning
from lcmlora.config import Training
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.sampling_plan import SamplingPlan, Shard
from lcmlora.diffusion.noise import generator
from lcmlora.parallel.ranks import Ranks

# Multiples of these, modulo 1, are spread evenly over [0, 1): the golden and the silver ratio, less their whole part.
_GOLDEN = 0.6180339887498949
_SILVER = 0.4142135623730951


@dataclass
class Batch:
    """Samples with all their random numbers, on the device.

    The noisy states of a step are z with noise, or those of a teacher rollout (`pair`), or those that a student rollout
    reaches (`stops`, `fresh`).
    """

    sample_indices: range
    z: Tensor  # (B, C, h, w) clean latents, sampled from the VAE's posterior; without rows if there is a pair
    noise: Tensor  # (B, C, h, w); without rows if there is a pair
    index: Tensor  # (B,) int64, rows of the solver timesteps
    w: Tensor  # (B,) guidance weight in the papers' convention
    u: Tensor  # (B, 2) uniform numbers in [0, 1) for the objective
    conditioning: Conditioning
    pair: Tensor | None = None  # (2, B, C, h, w) states of the teacher rollout at `index` and one solver step later
    stops: Tensor | None = None  # (J, B) int64, solver timesteps' rows where the rollout's steps end; last `index`
    fresh: Tensor | None = None  # (J, B, C, h, w) noise that the student's sampler adds at these stops


def split_rows(cache: LatentCache, settings: Training) -> tuple[Tensor, Tensor]:
    """Returns the rows of the cache to train on and those to validate with, both (N,) int64, ascending.

    All pictures of a caption are on one side. Captions are kept from training until there are `validation_pictures`
    pictures or a tenth of the cache. If all pictures have the same caption, single pictures are kept.
    """
    least = min(settings.validation_pictures, max(1, len(cache) // 10))
    groups = cache.captions()
    if int(groups.max()) == 0:
        groups = torch.arange(len(cache))
    order = torch.randperm(int(groups.max()) + 1, generator=generator("validation", settings.seed))
    sizes = torch.bincount(groups, minlength=len(order))[order]
    taken = int((sizes.cumsum(0) < least).sum()) + 1
    held = torch.isin(groups, order[: min(taken, len(order) - 1)])
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def chunks(cache: LatentCache, rows: Tensor, size: int) -> list[Tensor]:
    """Returns the rows (N,) in parts of at most `size`, each of one aspect bucket."""
    bucket = cache.bucket(rows)
    return [part for number in bucket.unique() for part in rows[bucket == number].split(size)]


class Batches:
    """The stream of samples from rows of the cache, and this process's part of each step."""

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
        grid: number of timesteps that `index` is drawn from.
        guidance: lowest and highest w.
        trajectory, rollout: shares of the steps that begin at states of teacher rollouts, and of student rollouts.
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

    @property
    def whole(self) -> int:
        """Samples in a step, over all processes."""
        return self._settings.batch

    @property
    def accumulate(self) -> int:
        """Forwards of this process in a step."""
        return self._settings.accumulate

    def sample_indices(self, step: int, part: int) -> range:
        """Returns the sample indices of this process's `part`-th forward of a step."""
        start = step * self._settings.batch + (self._ranks.rank * self._settings.accumulate + part) * self.size
        return range(start, start + self.size)

    def rows(self, sample_indices: range) -> Tensor:
        """Returns the rows of the cache, (B,) int64, that the plan has for these samples of one step."""
        step, start = divmod(sample_indices.start, self._settings.batch)
        if step != self._step:
            plan = self._plan
            self._cache.advance_to(step)
            batch = plan.batch(step)
            first = self._counts.cumsum(0) - self._counts
            order = first[torch.from_numpy(batch.shards)] + torch.from_numpy(batch.rows)
            self._step, self._order = step, self._candidates[order]
        return self._order[start : start + len(sample_indices)]

    @cached_property
    def _counts(self) -> Tensor:
        """The number of candidates in each shard."""
        return self._cache.shards(self._candidates).bincount()

    @cached_property
    def _plan(self) -> SamplingPlan:
        s = self._settings
        shards = [Shard(self._cache.bucket_of_shard(i), n) for i, n in enumerate(self._counts.tolist())]
        plan = SamplingPlan(s.seed, shards, s.batch, window=s.window)
        self._cache.follow_plan(plan, s.batch, s.window)
        return plan

    def names(self, rows: Tensor) -> list[str]:
        """Returns the file names of the pictures in these rows of the cache, for messages."""
        return self._cache.names(rows)

    def draw(self, step: int, part: int = 0) -> Batch:
        """Returns the samples of this process's `part`-th forward of a step."""
        sample_indices = self.sample_indices(step, part)
        rows = self.rows(sample_indices)
        # Uniform over the steps and evenly spread, so that each kind of step has its share in a short run, too.
        kind = (step * _SILVER + float(self._offset)) % 1
        batch = self.at(sample_indices, rows, noised=kind >= self._trajectory)
        if kind < self._trajectory:
            batch.pair = self._cache.states(rows, self._index(sample_indices)).to(self._device)
        elif kind < self._trajectory + self._rollout:
            self._add_student_rollout(batch, halts=step % 2)
        return batch

    def _index(self, sample_indices: range) -> Tensor:
        """Returns the rows of the solver timesteps (B,) int64 for these samples.

        Each is uniform by itself. Those of a step are spread evenly, whatever its size, so that the loss of a step
        hardly depends on which timesteps it has.
        """
        numbers = torch.arange(sample_indices.start, sample_indices.stop, dtype=torch.float64)
        even = (numbers * _GOLDEN + self._offset) % 1
        return (even * self._grid).long()

    def _add_student_rollout(self, batch: Batch, halts: int) -> None:
        """Adds a student rollout from pure noise to these samples' timesteps.

        Args:
            halts: stops before the last one.
        """
        generators = [generator("run", self._settings.seed, number) for number in batch.sample_indices]
        index, last = self._index(batch.sample_indices), self._grid - 1
        stops, fresh = [index], []
        for _ in range(halts):
            above = torch.stack([torch.rand((), generator=g) for g in generators])
            stops.insert(0, (stops[0] + 1 + (above * (last - stops[0])).long()).clamp(max=last))
        for _ in stops:
            fresh.append(torch.stack([torch.randn(batch.noise.shape[1:], generator=g) for g in generators]))
        batch.stops = torch.stack(stops).to(self._device)
        batch.fresh = torch.stack(fresh).to(self._device)

    def at(self, sample_indices: range, rows: Tensor, *, noised: bool = True) -> Batch:
        """Returns samples: these rows of the cache with the random numbers of these sample indices.

        Args:
            noised: with latents and noise. Without, `z` and `noise` have no rows.
        """
        s, (w_min, w_max) = self._settings, self._guidance
        # Each sample has a generator of its own, on the CPU: a GPU then trains on the very same numbers.
        generators = [generator("sample", s.seed, number) for number in sample_indices]
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
            sample_indices=sample_indices,
            z=z,
            noise=noise,
            index=self._index(sample_indices),
            w=w_min + (w_max - w_min) * u[:, 0],
            u=u[:, 2:],
            conditioning=conditioning,
        )
        moved = {name: value.to(self._device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        moved_conditioning = {name: value.to(self._device) for name, value in conditioning.items()}
        return Batch(sample_indices, **moved, conditioning=moved_conditioning)
