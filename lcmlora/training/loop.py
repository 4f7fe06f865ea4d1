"""The training loop, readable from top to bottom, for whatever has a loss: distillation, style LoRAs, fine-tunes.

It steps, looks at the losses now and then, validates, keeps the best weights and a checkpoint. What a step sees is a
pure function of the seed and the step (batches.py), so a run that was killed ends, started again, with the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lcmlora.config import Training
from lcmlora.errors import UserError
from lcmlora.io.terminal import note
from lcmlora.parallel.ranks import Ranks
from lcmlora.progress import track
from lcmlora.training.batches import Batch, Batches
from lcmlora.training.checkpoint import Checkpoints
from lcmlora.training.optimization import Optimization

if TYPE_CHECKING:
    from PIL.Image import Image

_PATIENCE = 10  # steps in a row whose loss is not finite


class Logger(Protocol):
    """Where figures go while the loop runs."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def picture(self, name: str, picture: Image, step: int) -> None: ...


class NullLogger:
    """Keeps nothing; the loop never asks whether anybody listens."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        del metrics, step

    def picture(self, name: str, picture: Image, step: int) -> None:
        del name, picture, step


class Trainable(Protocol):
    """What is learned."""

    def losses(self, batch: Batch, optimization: Optimization) -> Tensor:
        """Returns the loss of each sample, (B,), with gradients to the weights under training."""
        ...


class Validator(Protocol):
    """How far the student has come."""

    def look(self, step: int, logger: Logger) -> float:
        """Logs what there is to see of the live weights at this step and returns their loss."""
        ...


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
    agree: dict[str, Any],
    logger: Logger,
    ranks: Ranks,
) -> dict[str, Any]:
    """Trains to the last step and returns the state: `best` (of the first process), `history` of validation, `loss`.

    Args:
        label: of the progress bar.
        validator: makes the validation, once the weights are those of the checkpoint that is continued.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        check: called after steps that were looked at; raises where training has no effect.
        agree: what all processes must have in common.

    Raises:
        UserError: the loss is not finite ten times in a row, or the processes have different files.
    """
    checkpoints = Checkpoints(scratch)
    state = checkpoints.load() or {"step": 0, "loss": float("nan"), "best": None, "history": {}}
    if "optimization" in state:
        optimization.restore(state["optimization"])
    ranks.agree(**agree, settings=settings, first_step=state["step"])
    validation = validator() if ranks.first and state["step"] < settings.steps else None

    window = _Window(batches, settings, ranks)
    remaining = range(state["step"], settings.steps)
    progress = track(
        remaining,
        label,
        total=settings.steps,
        completed=remaining.start,
        unit=settings.batch,
        quiet=not ranks.first,
    )
    for step in progress:
        losses, norm = take_step(trainable, optimization, batches, settings, step)
        window.add(step, losses)

        done = state["step"] = step + 1
        last = done == settings.steps
        saving = last or done % settings.checkpoint_every == 0
        if saving or done % settings.log_every == 0:
            figures = window.close(norm)
            check()
            state["loss"] = figures["loss"]
            logger.log(figures | {"learning_rate": optimization.rate(step)}, done)
            progress.note(loss=figures["loss"])
        if validation and (last or done % settings.validate_every == 0):
            with window.paused(), optimization.averaged() as weights:
                loss = validation.look(done, logger)
                if state["best"] is None or loss < state["best"]["loss"]:
                    state["best"] = {"step": done, "loss": loss, "weights": weights.to("cpu", copy=True)}
            progress.note(validation=loss)
            state["history"][str(done)] = loss
        if saving and ranks.first:
            with window.paused():
                checkpoints.save(state | {"optimization": optimization.state()})
    return state


def take_step(
    trainable: Trainable, optimization: Optimization, batches: Batches, settings: Training, step: int
) -> tuple[Tensor, Tensor]:
    """Returns the losses of this process's samples, (accumulate, B), and the norm of the gradient over all, ()."""
    losses = []
    for part in range(settings.accumulate):
        loss = trainable.losses(batches.draw(step, part), optimization)
        optimization.backward(loss.mean() / settings.accumulate)
        losses.append(loss.detach())
    return torch.stack(losses), optimization.step(step)


class _Window:
    """The losses since the last look at them. They stay on the device, which the host waits for only when looking."""

    def __init__(self, batches: Batches, settings: Training, ranks: Ranks) -> None:
        self._batches = batches
        self._settings = settings
        self._ranks = ranks
        self._loss = float("nan")  # of the last window that had one
        self._bad = 0  # steps in a row up to now whose loss is not finite
        self._losses: list[tuple[int, Tensor]] = []
        self._began = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The rate does not count the time spent in this block."""
        paused = time.monotonic()
        yield
        self._began += time.monotonic() - paused

    def add(self, step: int, losses: Tensor) -> None:
        self._losses.append((step, losses))

    def close(self, norm: Tensor) -> dict[str, float]:
        """Returns the figures of the steps since the last call: the mean of the losses that are finite, and the rate.

        Raises:
            UserError: too many steps in a row had a loss that is not finite; with the pictures it came from.
        """
        s = self._settings
        first, last = self._losses[0][0], self._losses[-1][0]
        losses = torch.zeros(last - first + 1, s.batch, device=norm.device)
        for step, values in self._losses:
            place = self._batches.positions(step, 0).start - step * s.batch
            losses[step - first, place : place + values.numel()] = values.flatten()
        self._ranks.add_up(losses)
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
            told = f"of the steps {first + 1} to {last + 1} {skipped} were skipped: their loss was not finite"
            note(f"warning: {told}")
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
