"""Distribution matching: the student's pictures are moved to where the teacher finds them likelier.

One frozen base is three models: with its adapter off the teacher, with the student's adapter the student, and with a
second adapter of the same layers the *fake score*, a diffusion model of the student's own pictures. The student draws
from noise, without the data set; its picture is noised; and the difference of what fake score and teacher predict there
is the gradient of the Kullback-Leibler divergence of the two distributions (DMD, arXiv 2311.18828, eq. 7; DMD2, arXiv
2405.14867). The fake score learns the student's pictures between the student's steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcmlora.adapters import lora
from lcmlora.bases.families import Conditioning
from lcmlora.diffusion import solver
from lcmlora.diffusion.noise import generator
from lcmlora.distillation.loss import Distillation
from lcmlora.settings.training import Polish
from lcmlora.training.batches import Batch, Batches
from lcmlora.training.loop import Trainable
from lcmlora.training.optimization import Optimization, OptimizationState

_NOISED = (0.02, 0.98)  # shares of the schedule between which pictures are noised (DMD, section 3.2)
_LEAST_SCALE = 0.05  # of the gradient's denominator


class _Noised(NamedTuple):
    """How a picture is noised: to the timesteps t (B,) int64, with the noise (B, C, h, w)."""

    t: Tensor
    noise: Tensor


class _Draw(NamedTuple):
    """The random numbers of one student rollout and of what follows it, as a pure function of their keys.

    steps: of the student.
    at: the step whose prediction is the picture, counted from 0.
    noise: (at + 1, B, C, h, w), the initial noise and what is added after each step before that.
    learned: how the fake score learns the picture.
    compared: how teacher and fake score are compared on it.
    """

    steps: int
    at: int
    noise: Tensor
    learned: _Noised
    compared: _Noised


class _Rollout(NamedTuple):
    """What the student drew from noise.

    x: (B, C, h, w), the state before its last step.
    at: (B,) int64, the timestep of that state.
    picture: (B, C, h, w), what it predicts there.
    """

    x: Tensor
    at: Tensor
    picture: Tensor


class DistributionMatching(Trainable):
    """The loss of a polish: distribution matching plus the consistency loss of the distillation before.

    It also trains the fake score, before each step of the student (`training.loop.Companion`). The last pictures that
    the fake score learns before a step are those that the student learns by in it, so that they are drawn once.
    """

    def __init__(
        self,
        distillation: Distillation,
        student: Optimization,
        fake: Optimization,
        batches: Batches,
        settings: Polish,
        seed: int,
    ) -> None:
        """Args:
        student, fake: of the same parameters; the network has the student's weights.
        batches: whose captions the student draws.
        """
        self._distillation, self._batches = distillation, batches
        self._student, self._fake = student, fake
        self._settings, self._seed = settings, seed
        self._schedule = distillation.base.schedule
        self._drawn: dict[range, tuple[_Draw, _Rollout]] = {}  # of this step, by sample indices

    def losses(self, batch: Batch, optimization: Optimization | None = None) -> Tensor:
        terms = list(self.parts(batch, optimization or self._student))
        return sum(terms[1:], terms[0])

    def parts(self, batch: Batch, optimization: Optimization) -> Iterator[Tensor]:
        draw, rollout = self._drawn.pop(batch.sample_indices)
        yield self.matching(batch, draw, rollout)
        if self._settings.consistency:
            yield self._settings.consistency * self._distillation.losses(batch, optimization)
        if self._settings.anchor:
            yield self._settings.anchor * self.anchoring(batch, draw.noise[0])

    def matching(self, batch: Batch, draw: _Draw, rollout: _Rollout) -> Tensor:
        """Returns the distribution matching loss of each sample, (B,). Its gradient with respect to the picture is

        (fake - teacher) / max(mean |picture - teacher|, 0.05), in latents predicted without noise.
        """
        with torch.no_grad():
            x = self._schedule.state(rollout.picture, draw.compared.noise, draw.compared.t)
            teacher = self._teacher(x, draw.compared.t, batch.conditioning)
            with self._as_fake():
                fake = self._distillation.student(x, draw.compared.t, batch.conditioning).x0
            scale = (rollout.picture - teacher).abs().flatten(1).mean(1).clamp(min=_LEAST_SCALE)
            target = rollout.picture - (fake - teacher) / scale.view(-1, *(1,) * (x.ndim - 1))
        # Only now with a gradient: the student's weights in the network must not change until its backward pass.
        picture = self._picture(rollout.x, rollout.at, batch.conditioning)
        return 0.5 * (picture - target).square().flatten(1).mean(1)

    def anchoring(self, batch: Batch, noise: Tensor) -> Tensor:
        """Returns the error of the student's first step from noise (B, C, h, w), of each sample, (B,).

        The teacher takes `anchor_steps` steps from the same noise, with the guidance of the distillation. The error is
        0 where one step of the student arrives at the same state (DP-DMD, arXiv 2602.03139). It is measured in latents
        without noise.
        """
        d = self._distillation
        start = d.teacher.t[-1].expand(len(noise))
        x, rows = noise, range(len(d.teacher.t))[::-1][: self._settings.anchor_steps]
        for row in rows:
            t, s = (times[row].expand(len(noise)) for times in (d.teacher.t, d.teacher.t_prev))
            x = d.teacher.step(x, t, s, batch.w, batch.conditioning)
        target = self._schedule.x0_of_step(noise, start, x, d.teacher.t_prev[rows[-1]].expand(len(noise)))
        first = d.student(noise, start, batch.conditioning).x0
        return (first - target).square().flatten(1).mean(1)

    def _teacher(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the x0 (B, C, h, w) that the guided teacher predicts."""
        if not self._settings.w:
            with lora.disabled(self._distillation.base.network):
                return self._distillation.student(x, t, conditioning).x0
        both = self._distillation.teacher.outputs(x, t, conditioning)
        guided = solver.guide(*both, torch.full((len(x),), self._settings.w, device=x.device))
        return self._schedule.prediction(guided, x, t).x0

    @torch.no_grad()
    def _rollout(self, conditioning: Conditioning, draw: _Draw) -> _Rollout:
        """Returns what the student draws from noise, up to the step `draw.at`."""
        d = self._distillation
        timesteps = solver.student_timesteps(len(self._schedule), len(d.teacher.t), draw.steps)
        rows = [torch.full_like(draw.learned.t, t) for t in timesteps[: draw.at + 1]]
        x = draw.noise[0]
        for step in range(draw.at):
            t, s = rows[step], rows[step + 1]
            x = d.objective.step(x, d.student(x, t, conditioning), t, s, draw.noise[step + 1])
        return _Rollout(x, rows[-1], self._picture(x, rows[-1], conditioning))

    def _picture(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the picture (B, C, h, w) to which the student jumps from x at t."""
        d = self._distillation
        return d.objective.jump(x, d.student(x, t, conditioning), t, torch.zeros_like(t))

    def before_step(self, step: int) -> None:
        """Trains the fake score on the student's pictures of the captions of this step, and before the first more."""
        self._drawn.clear()
        updates = self._settings.fake_updates + (self._settings.head_start if step == 0 else 0)
        for number in range(updates):
            self._update_fake(step, number)

    def _update_fake(self, step: int, number: int) -> None:
        accumulate = self._batches.accumulate
        for part in range(accumulate):
            batch = self._batches.draw(step, part)
            draw = self._draw(number, batch.sample_indices, batch.noise)
            rollout = self._rollout(batch.conditioning, draw)
            self._drawn[batch.sample_indices] = draw, rollout
            x = self._schedule.state(rollout.picture, draw.learned.noise, draw.learned.t)
            with self._as_fake():
                output = self._distillation.base.predict(x, draw.learned.t, batch.conditioning)
                target = self._schedule.target(rollout.picture, draw.learned.noise, draw.learned.t)
                self._fake.backward((output.float() - target).square().mean() / accumulate)
                if part == accumulate - 1:
                    self._fake.step(step)

    @contextlib.contextmanager
    def _as_fake(self) -> Iterator[None]:
        """Within the block the adapter is the fake score's. A backward pass must begin and end in it, or outside."""
        self._fake.take_network()
        try:
            yield
        finally:
            self._student.take_network()

    def state(self) -> OptimizationState:
        return self._fake.state()

    def restore(self, state: OptimizationState) -> None:
        self._fake.restore(state)
        self._student.take_network()

    def _draw(self, number: int, samples: range, like: Tensor) -> _Draw:
        """Returns the random numbers for these samples (B,) of the fake score's update of this number.

        The number of steps is the same for a whole step of training, so that its samples are one batch.
        """
        choice = generator("polish", self._seed, number, samples.start // self._batches.whole)
        counts = self._settings.student_steps
        steps = counts[int(torch.randint(len(counts), (), generator=choice))]
        at = int(torch.randint(steps, (), generator=choice))
        each = [generator("polish sample", self._seed, number, index) for index in samples]
        shape = (at + 3, *like.shape[1:])
        noise = torch.stack([torch.randn(shape, generator=g) for g in each], dim=1).to(like.device)
        low, high = (int(share * len(self._schedule)) for share in _NOISED)
        t = torch.stack([torch.randint(low, high, (2,), generator=g) for g in each], dim=1).to(like.device)
        return _Draw(steps, at, noise[:-2], _Noised(t[0], noise[-2]), _Noised(t[1], noise[-1]))
