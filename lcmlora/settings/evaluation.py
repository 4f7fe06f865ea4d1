"""Settings of what is drawn, measured and asked for: `evaluation`, `study` and `gate`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lcmlora.io.parsing import JsonObject
from lcmlora.plugins import FEATURES, SCORES
from lcmlora.settings.data import Data
from lcmlora.settings.fields import Device, Name, OneOf, Positive, Seed, Share, Strict
from lcmlora.settings.layers import Changes

Solver = Literal["ddim", "dpm++", "unipc", "euler"]


def _none_or_several(count: int) -> int:
    if count == 1:
        raise ValueError("one has no spread; 0 for none, or at least 2")
    return count


class Evaluation(Strict):
    """What is drawn and measured (stages `reference` and `evaluate`)."""

    seed: Seed = 1000
    """Seed of the noise that every method begins with."""
    pictures: Annotated[int, Field(ge=2)] = 512
    """Pictures with each method. More than the features have dimensions (efficientnet-lite0: 320)."""
    batch: Positive
    """Pictures drawn at once."""
    features: Annotated[str, OneOf(FEATURES)] = "efficientnet-lite0"
    """Image features of the Frechet distance. inception and clip are downloaded."""
    features_source: str | None = None
    """inception: a file of weights; clip: a hub id or a folder. null: their hubs."""
    scores: tuple[Annotated[str, OneOf(SCORES)], ...] = ()
    """Scores by models of human preference or of text and picture. They are downloaded."""
    scores_source: dict[str, str] = {}
    """Hub id or folder for each score. Without one, its own hub."""
    guidance_scale: Annotated[float, Field(ge=1)] = 8.5
    """guidance_scale of the teacher and of the solvers in the pipelines' convention: w + 1 of distill's w."""
    teacher_steps: Positive = 50
    """DDIM steps of the teacher's pictures, which all else is compared with."""
    solvers: Annotated[tuple[Solver, ...], Field(min_length=1)] = ("ddim", "dpm++", "unipc", "euler")
    """Solvers that the student is compared with."""
    solver_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32)
    """Steps with each solver."""
    student_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    """Steps with the student."""
    grid_rows: Positive = 8
    """Rows of the contact sheet."""
    resamples: Annotated[int, Field(ge=0), AfterValidator(_none_or_several)] = 200
    """Bootstrap resamples for the confidence intervals. 0: no intervals."""
    latency_repeats: Positive = 20
    """Pictures drawn one by one with each method, to measure seconds per picture."""
    device: Device = "auto"
    """auto: the GPU where there is one."""


class Study(Strict):
    """The adapter added to style LoRAs and fine-tuned checkpoints (stage `study`)."""

    models: tuple[Name, ...] = ()
    """Which of `models` are studied. The others are released without a study."""
    styles: tuple[Name, ...] = ()
    """Entries of `styles`. A LoRA of each is trained for each of the studied models."""
    finetunes: tuple[Name, ...] = ()
    """Entries of `finetunes`. A whole checkpoint of each is trained for each of the studied models."""
    pictures: Annotated[int, Field(ge=2)] = 1024
    """Pictures of each style with each method."""
    real: Annotated[JsonObject, Changes(Data)] = {}
    """Changes of a style's `data` for the real pictures that it is measured against."""
    weights: tuple[float, float] = (0.8, 1.0)
    """Weights of the style and of the acceleration: lambda1 and lambda2 of equation (3) in arXiv 2311.05556, whose
    numbers these are."""
    solver_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    """DPM-Solver++ steps of the style alone."""
    student_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Steps of the accelerated style."""
    steps: Positive = 4
    """Steps at which all is compared at equal network evaluations, and at which guidance and weights vary. One of
    `student_steps`, and even."""
    guidance_scales: tuple[Annotated[float, Field(gt=1)], ...] = (1.5, 2.0, 3.0)
    """guidance_scale of the accelerated style, besides none."""
    grid_style: str | None = None
    """Style of the grid of weights. null: the first of `styles`."""
    grid_style_weights: tuple[float, ...] = (0.0, 0.4, 0.8, 1.2)
    """Weights of the style in the grid."""
    grid_adapter_weights: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    """Weights of the acceleration in the grid."""

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.steps % 2:
            raise ValueError(f"steps {self.steps} is odd, and a guided solver step costs two evaluations")
        if self.steps not in self.student_steps:
            raise ValueError(f"student_steps has no {self.steps}, at which all is compared (steps)")
        if self.grid_style is not None and self.grid_style not in self.styles:
            raise ValueError(f"grid_style: {self.grid_style!r} is not among styles")
        if twice := set(map(str.lower, self.styles)) & set(map(str.lower, self.finetunes)):
            raise ValueError(f"{min(twice)!r} is the name of a style and of a fine-tune")
        return self


class Gate(Strict):
    """When a candidate may become champion."""

    steps: Positive = 4
    """The student at this many steps must be nearer to the teacher than every solver at as many network
    evaluations."""
    min_retrieval: Share = 0.8
    """Lowest caption retrieval@1 of the student, as a share of the teacher's."""
    max_excess: float | None = None
    """Highest Frechet distance of the student above the floor, in the units of the features. null: no limit."""
    champion: bool = True
    """The candidate must not be worse than the champion by more than the confidence interval."""
