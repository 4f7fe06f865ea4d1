"""A distillation of the miniature as a process: python -m tests.support.trainer BASE LATENTS WORK KILL_AT VICTIM.

Started by a launcher it is one of many. At step KILL_AT the first process kills itself, or its launcher, as `kill -9`
would, or pauses.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.distill import distill_adapter
from lcmlora.io.files import locked
from lcmlora.parallel import ranks
from lcmlora.training.loop import NullLogger
from tests.support.distillation import SETTINGS, load_parts

SLOW = SETTINGS.model_copy(update={"lr": 1e-4})  # Adam turns rounding of a gradient into whole steps


class Killer(NullLogger):
    def __init__(self, at: int, victim: str, work: Path) -> None:
        self._at, self._victim, self._work = at, victim, work

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == self._at and self._victim == "pause":
            (self._work / "paused").touch()
            time.sleep(60)
        elif step == self._at:
            os.kill(os.getpid() if self._victim == "self" else os.getppid(), signal.SIGKILL)
            time.sleep(60)


def main(base: str, latents: str, work: str, kill_at: str, victim: str) -> None:
    torch.set_num_threads(1)
    scratch = Path(work, "scratch")
    scratch.mkdir(parents=True, exist_ok=True)
    with ranks.connected("cpu") as place, locked(scratch / str(place.rank)):
        distill_adapter(
            load_parts(Path(base), "network"),
            LatentCache(Path(latents)),
            SLOW,
            scratch,
            Path(work, "adapter"),
            identity={"source": "mini"},
            logger=Killer(int(kill_at), victim, Path(work)) if place.first else NullLogger(),
            ranks=place,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
