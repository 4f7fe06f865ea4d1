"""A distillation of the miniature as a process of its own: python -m tests.trainer BASE LATENTS WORK KILL_AT.

Started by a launcher it is one of many. At step KILL_AT the first process kills itself as `kill -9` would.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from lcmlora import ranks
from lcmlora.data.cache import LatentCache
from lcmlora.distill import distill
from lcmlora.training import NullLogger
from tests.distillation import SETTINGS, load_parts

SLOW = SETTINGS.model_copy(update={"lr": 1e-4})  # Adam makes steps of a gradient's last bits


class Killer(NullLogger):
    def __init__(self, at: int) -> None:
        self._at = at

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(base: str, latents: str, work: str, kill_at: str) -> None:
    torch.set_num_threads(1)
    scratch = Path(work, "scratch")
    scratch.mkdir(parents=True, exist_ok=True)
    with ranks.connected("cpu") as place:
        distill(
            load_parts(Path(base), "unet"),
            LatentCache(Path(latents)),
            SLOW,
            scratch,
            Path(work, "adapter"),
            identity={"source": "mini"},
            run={"run_id": None},
            logger=Killer(int(kill_at)) if place.first else NullLogger(),
            ranks=place,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
