"""What lies beside an adapter's weights: the names of these files, how it is drawn with, what it was made for."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = "pytorch_lora_weights.safetensors"
SCHEDULER = "scheduler_config.json"
FACTS = "config.json"  # what distill and combine say of an adapter


@dataclass(frozen=True)
class Sampler:
    """How a student is drawn with; see objectives.Sampler."""

    scheduler: str = "LCMScheduler"
    gamma: float | None = None
    grid: int = 50


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter by the files beside it; None where nothing is."""

    model: str | None = None
    base: dict[str, str | None] | None = None  # source, revision and digest of the base that it was made for
    resolution: int | None = None  # pixels
    sampler: Sampler | None = None
    kohya: str | None = None  # the name of the release's file for ComfyUI and A1111
