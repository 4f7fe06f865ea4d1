"""A distillation that takes a second: settings, the miniature as it needs it, a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lcmlora import bases
from lcmlora.adapters.metadata import Distilled
from lcmlora.config import Base, Distill
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.distill import distill_adapter
from lcmlora.distillation.loss import sample_stream
from lcmlora.training.loop import NullLogger
from tests.support.miniature import RESOLUTION

CPU = torch.device("cpu")
SETTINGS = Distill(
    objective="lcm",
    seed=3,
    steps=6,
    batch=4,
    lr=1e-2,
    warmup=2,
    cooldown=0.5,
    weight_decay=0.0,
    max_grad_norm=1.0,
    ema=0.9,
    rank=4,
    alpha=8,
    w_min=3.0,
    w_max=7.5,
    grid=50,
    huber_c=1e-3,
    weighting="uniform",
    checkpoint_every=2,
    log_every=2,
    validate_every=3,
    validation_pictures=1,
)


class Recorder(NullLogger):
    """Keeps what the loop logs."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.skipped: list[float] = []
        self.validation: dict[int, float] = {}
        self.pictures: dict[int, Image.Image] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics:
            self.steps.append(step)
            self.losses.append(metrics["loss"])
            self.skipped.append(metrics["skipped_steps"])
        else:
            self.validation[step] = metrics["validation_loss"]

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.pictures[step] = picture


def load_parts(folder: Path, *parts: str, variant: str | None = None) -> bases.LoadedBase:
    settings = Base(source=str(folder), resolution=RESOLUTION, license="apache-2.0", variant=variant)
    return bases.load("mini", settings, folder, device=CPU, parts=parts)


def run_distill(
    base: bases.LoadedBase,
    cache: LatentCache,
    work: Path,
    settings: Distill = SETTINGS,
    logger: Any = None,
    decode: Any = None,
) -> Distilled:
    (work / "scratch").mkdir(parents=True, exist_ok=True)
    made = distill_adapter(
        base,
        cache,
        settings,
        work / "scratch",
        work / "adapter",
        identity={"source": "mini", "revision": None, "digest": "0"},
        logger=logger or NullLogger(),
        decode=decode,
    )
    assert made is not None
    return made


def draw_batch(cache: LatentCache, settings: Distill = SETTINGS, step: int = 0) -> Any:
    return sample_stream(cache, torch.arange(len(cache)), settings, CPU).draw(step)
