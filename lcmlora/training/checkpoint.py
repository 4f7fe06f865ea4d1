"""A training run that can be killed at any moment: atomic checkpoints in a locked scratch folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write
from lcmlora.training.optimization import OptimizationState


class BestWeights(TypedDict):
    """The averaged weights that had the lowest validation loss so far."""

    step: int
    loss: float
    weights: Tensor  # (N,) fp32, on the CPU


class Checkpoint(TypedDict):
    """The state of a run after `step` steps."""

    step: int
    loss: float  # mean of the last steps
    best: BestWeights | None  # None on all processes but the first, which alone validates
    history: dict[str, float]  # validation loss by step
    optimization: OptimizationState
    companion: NotRequired[OptimizationState | None]  # of weights that are trained besides


class Checkpoints:
    """The latest checkpoint of one run. Saving replaces it atomically, so there is always a whole one."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "checkpoint.pt"

    def load(self) -> Checkpoint | None:
        """Returns the latest checkpoint, its tensors on the CPU, or None if the run has none yet."""
        if not self._path.exists():
            return None
        checkpoint: Checkpoint = torch.load(self._path, map_location="cpu", weights_only=True)
        return checkpoint

    def save(self, checkpoint: Checkpoint) -> None:
        """Raises UserError if the disk is full; the previous checkpoint is then still there."""
        try:
            atomic_write(self._path, lambda path: torch.save(checkpoint, path))
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
            free = shutil.disk_usage(self._path.parent).free
            raise UserError(f"{self._path}: cannot write the checkpoint ({free / 1e6:.0f} MB free): {error}") from error
