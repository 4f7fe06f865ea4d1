"""The training loop of all that has a loss: distillation, style LoRAs, fine-tunes.

Every few steps the loop logs the losses, validates, keeps the best weights and writes a checkpoint. The samples of a
step are a pure function of the seed and the step (batches.py), so a killed run that is started again ends with the same
bytes as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lcmlora.config import Training
from lcmlora.errors import UserError
from lcmlora.io.terminal import note
from lcmlora.parallel.ranks import Ranks
from lcmlora.progress import track
from lcmlora.training.batches import Batch, Batches
from lcmlora.training.checkpoint import BestWeights, Checkpoints
from lcmlora.training.optimization import Optimization, OptimizationState

if TYPE_CHECKING:
    from PIL.Image import Image

_PATIENCE = 10  # steps in a row whose loss is not finite


class Logger(Protocol):
    """Keeps the figures and pictures of a run."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, picture: Image, step: int) -> None: ...


class NullLogger:
    """Keeps nothing. It stands in where no figures are wanted, so that the loop always has a logger."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        del metrics, step

    def picture(self, name: str, picture: Image, step: int) -> None:
        del name, picture, step


class Trainable(ABC):
    """Computes the loss that is minimized."""

    @abstractmethod
    def losses(self, batch: Batch, optimization: Optimization | None = None) -> Tensor:
        """Returns the loss of each sample, (B,), with gradients to the weights under training."""

    def parts(self, batch: Batch, optimization: Optimization) -> Iterator[Tensor]:
        """Yields the terms of the loss of each sample, (B,), whose sum is minimized.

        The backward pass of a term runs before the next is computed, so that the activations of one are in memory.
        """
        yield self.losses(batch, optimization)


class Companion(Protocol):
    """Weights besides those under training, which are trained between their steps."""

    def before_step(self, step: int) -> None:
        """Trains what belongs before this step."""
        ...

    def state(self) -> OptimizationState:
        """Returns the state for a checkpoint; its tensors are the live ones."""
        ...

    def restore(self, state: OptimizationState) -> None:
        """Continues from the state of a checkpoint."""
        ...


class Validator(Protocol):
    """Measures the network on pictures kept from training."""

    def validate(self, step: int, logger: Logger) -> float:
        """Logs the figures and pictures of the network as it is at this step, and returns its loss."""
        ...


@dataclass
class TrainingState:
    """The progress of a run, without the optimizer's tensors."""

    step: int = 0  # steps done
    loss: float = float("nan")  # mean of the last steps
    best: BestWeights | None = None  # on the first process alone, which validates
    history: dict[str, float] = field(default_factory=dict)  # validation loss by step


def train(
    label: str,
    trainable: Trainable,
    optimization: Optimization,
    batches: Batches,
    validator: Callable[[], Validator],
    settings: Training,
    scratch: Path,
    *,
    check: Callable[[], None],
    agree: Mapping[str, object],
    logger: Logger,
    ranks: Ranks,
    companion: Companion | None = None,
    validate_start: bool = False,
) -> TrainingState:
    """Trains to the last step and returns the final state.

    Args:
        label: of the progress bar.
        validator: returns the validator. It is called after the weights of a checkpoint are loaded, on the first
            process alone.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        check: is called when losses are logged; it raises if training has no effect.
        agree: by name, what must be equal on all processes: values that JSON can hold.
        companion: is trained before each step.
        validate_start: the weights before the first step are validated, too, and kept if none later are better.

    Raises:
        UserError: the loss is not finite ten times in a row, or the processes have different files.
    """
    checkpoints = Checkpoints(scratch)
    state = _continue(checkpoints, optimization, companion)
    ranks.agree(**agree, settings=settings, first_step=state.step)
    validation = validator() if ranks.first and state.step < settings.steps else None
    if validation and validate_start and state.step == 0:
        _validate(validation, optimization, state, logger)
    recent = _RecentLosses(batches, settings, ranks)
    progress = track(
        range(state.step, settings.steps),
        label,
        total=settings.steps,
        completed=state.step,
        unit=settings.batch,
        quiet=not ranks.first,
    )
    for step in progress:
        if companion:
            companion.before_step(step)
        losses, norm = take_step(trainable, optimization, batches, settings, step)
        recent.add(step, losses)

        done = state.step = step + 1
        last = done == settings.steps
        saving = last or done % settings.checkpoint_every == 0
        if saving or done % settings.log_every == 0:
            figures = recent.close(norm)
            check()
            state.loss = figures["loss"]
            logger.log(figures | {"learning_rate": optimization.rate(step)}, done)
            progress.note(loss=state.loss)
        if validation and (last or done % settings.validate_every == 0):
            with recent.paused():
                progress.note(validation=_validate(validation, optimization, state, logger))
        if saving and ranks.first:
            with recent.paused():
                checkpoints.save(
                    {
                        "step": state.step,
                        "loss": state.loss,
                        "best": state.best,
                        "history": state.history,
                        "optimization": optimization.state(),
                        "companion": companion.state() if companion else None,
                    }
                )
    return state


def _continue(checkpoints: Checkpoints, optimization: Optimization, companion: Companion | None) -> TrainingState:
    """Returns the state of the latest checkpoint, with all weights restored, or that of a new run."""
    checkpoint = checkpoints.load()
    if checkpoint is None:
        return TrainingState()
    optimization.restore(checkpoint["optimization"])
    if companion:
        kept = checkpoint.get("companion")
        assert kept is not None  # the checkpoint's settings are the same
        companion.restore(kept)
    return TrainingState(checkpoint["step"], checkpoint["loss"], checkpoint["best"], checkpoint["history"])


def _validate(validation: Validator, optimization: Optimization, state: TrainingState, logger: Logger) -> float:
    """Validates the averaged weights, keeps them in `state` if they are the best so far, and returns their loss."""
    with optimization.averaged() as weights:
        loss = validation.validate(state.step, logger)
        if state.best is None or loss < state.best["loss"]:
            state.best = {"step": state.step, "loss": loss, "weights": weights.to("cpu", copy=True)}
    state.history[str(state.step)] = loss
    return loss


def take_step(
    trainable: Trainable, optimization: Optimization, batches: Batches, settings: Training, step: int
) -> tuple[Tensor, Tensor]:
    """Returns the losses of this process's samples, (accumulate, B), and the norm of the gradient over all, ()."""
    losses = []
    for part in range(settings.accumulate):
        terms = []
        for term in trainable.parts(batches.draw(step, part), optimization):
            optimization.backward(term.mean() / settings.accumulate)
            terms.append(term.detach())
        losses.append(sum(terms[1:], terms[0]))
    return torch.stack(losses), optimization.step(step)


class _RecentLosses:
    """The losses since they were last read. They stay on the device: the host waits for it only when it reads them."""

    def __init__(self, batches: Batches, settings: Training, ranks: Ranks) -> None:
        self._batches = batches
        self._settings = settings
        self._ranks = ranks
        self._loss = float("nan")  # the last mean that was finite
        self._bad = 0  # steps in a row up to now whose loss is not finite
        self._losses: list[tuple[int, Tensor]] = []
        self._began = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent in this block out of the rate."""
        paused = time.monotonic()
        yield
        self._began += time.monotonic() - paused

    def add(self, step: int, losses: Tensor) -> None:
        self._losses.append((step, losses))

    def close(self, norm: Tensor) -> dict[str, float]:
        """Returns the figures of the steps since the last call: the mean of the losses that are finite, and the rate.

        Raises:
            UserError: too many steps in a row had a loss that is not finite; it names the pictures of the last one.
        """
        s = self._settings
        first, last = self._losses[0][0], self._losses[-1][0]
        losses = torch.zeros(last - first + 1, s.batch, device=norm.device)
        for step, values in self._losses:
            start = self._batches.sample_indices(step, 0).start - step * s.batch
            losses[step - first, start : start + values.numel()] = values.flatten()
        self._ranks.all_reduce_sum(losses)
        finite = losses.isfinite().all(1).tolist()
        for offset, fine in enumerate(finite):
            self._bad = 0 if fine else self._bad + 1
            if self._bad == _PATIENCE:
                step = first + offset
                rows = self._batches.rows(range(step * s.batch, (step + 1) * s.batch))
                culprits = self._batches.names(rows[~losses[offset].isfinite().cpu()])
                raise UserError(
                    f"step {step + 1}: the loss is not finite, for the {_PATIENCE}th time in a row; lower distill.lr "
                    f"or raise distill.precision. In this step it was so for {', '.join(dict.fromkeys(culprits))}"
                )
        skipped = len(finite) - sum(finite)
        if skipped and self._ranks.first:
            note(f"warning: of the steps {first + 1} to {last + 1} {skipped} were skipped: their loss was not finite")
        if any(finite):
            self._loss = losses[torch.tensor(finite)].mean().item()
        rate = losses.numel() / (time.monotonic() - self._began)
        self._losses, self._began = [], time.monotonic()
        return {
            "loss": self._loss,
            "gradient_norm": norm.item(),
            "images_per_second": rate,
            "skipped_steps": float(skipped),
        }
