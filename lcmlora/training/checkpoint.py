"""A training run that can be killed at any moment: atomic checkpoints in a locked scratch folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write


class Checkpoints:
    """The latest state of one run. Saving replaces it atomically, so there always is a whole one."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "checkpoint.pt"

    def load(self) -> dict[str, Any] | None:
        """Returns the last state saved, tensors on the CPU, or None at a fresh start."""
        if not self._path.exists():
            return None
        return torch.load(self._path, map_location="cpu", weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        """Raises UserError where the disk is full; the former checkpoint then still stands."""
        try:
            atomic_write(self._path, lambda path: torch.save(state, path))
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
            free = shutil.disk_usage(self._path.parent).free
            raise UserError(f"{self._path}: cannot write the checkpoint ({free / 1e6:.0f} MB free): {error}") from error
