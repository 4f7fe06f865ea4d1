"""The golden losses: twenty steps of each objective under a fixed seed. A change of them must be on purpose.

python -m tests.support.golden    writes them again after a change on purpose
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.distill import distill_adapter
from lcmlora.training.loop import NullLogger
from tests.conftest import make_latents
from tests.support.distillation import SETTINGS, load_parts
from tests.support.miniature import save_base

FILE = Path(__file__).with_name("golden.json")
OBJECTIVES = ("lcm", "tcd", "pcm", "tdd")


class _Losses(NullLogger):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.losses += [round(value, 7) for name, value in metrics.items() if name == "loss"]


def losses(objective: str, base: Path, cache: LatentCache, work: Path) -> list[float]:
    """Returns the loss of each of twenty steps."""
    changes = {"objective": objective, "steps": 20, "lr": 1e-3, "log_every": 1, "empty_prompts": 0.1}
    settings = SETTINGS.model_copy(update=changes | {"checkpoint_every": 20, "validate_every": 20})
    logger = _Losses()
    work.mkdir(parents=True, exist_ok=True)
    distill_adapter(load_parts(base, "network"), cache, settings, work, work / "out", identity={}, logger=logger)
    return logger.losses


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = save_base(work / "mini")
        cache = make_latents(base, work / "latents")
        found = {name: losses(name, base, cache, work / name) for name in OBJECTIVES}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
