"""Settings of a distillation that takes a second, and the miniature as it needs it."""

from __future__ import annotations

from pathlib import Path

import torch

from lcmlora import bases
from lcmlora.config import Base, Distill
from tests.miniature import RESOLUTION

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


def load_parts(folder: Path, *parts: str, variant: str | None = None) -> bases.LoadedBase:
    settings = Base(source=str(folder), resolution=RESOLUTION, license="apache-2.0", variant=variant)
    return bases.load("mini", settings, folder, device=CPU, parts=parts)
