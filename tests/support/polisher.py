"""A polish of the miniature as a process: python -m tests.support.polisher BASE LATENTS DISTILLED WORK.

Started by a launcher it is one of many.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.polish import polish_adapter
from lcmlora.io.files import locked
from lcmlora.parallel import ranks
from lcmlora.settings.training import Polish
from lcmlora.training.loop import NullLogger
from tests.support.distillation import SETTINGS, load_parts

POLISH = Polish(steps=4, lr=1e-4, fake_lr=1e-4, fake_updates=2, head_start=1, student_steps=(1, 2))


def main(base: str, latents: str, distilled: str, work: str) -> None:
    torch.set_num_threads(1)
    scratch = Path(work, "scratch")
    scratch.mkdir(parents=True, exist_ok=True)
    with ranks.connected("cpu") as place, locked(scratch / str(place.rank)):
        polish_adapter(
            load_parts(Path(base), "network"),
            LatentCache(Path(latents)),
            SETTINGS.model_copy(update={"polish": POLISH}),
            Path(distilled),
            scratch,
            Path(work, "adapter"),
            identity={"source": "mini"},
            logger=NullLogger(),
            judge=(lambda sampler: {"distance@1": 1.0}) if place.first else None,
            ranks=place,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
