"""Settings of what is drawn, measured and asked for: `evaluation`, `study`, `compatibility` and `gate`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from lcmlora.io.parsing import JsonObject
from lcmlora.plugins import FEATURES, SCORES
from lcmlora.settings.data import Data
from lcmlora.settings.fields import Device, Name, OneOf, Positive, Quotable, Seed, Share, Strict
from lcmlora.settings.layers import Changes

Solver = Literal["ddim", "dpm++", "unipc", "euler"]
Spacing = Literal["trailing", "leading", "linspace"]
Final = Literal["zero", "sigma_min", "euler_at_final"]
Strength = Annotated[float, Field(gt=0, le=1)]
KARRAS: tuple[Solver, ...] = ("dpm++", "unipc", "euler")  # which can take Karras sigmas (arXiv 2206.00364, eq. 5)


def check_options(solver: str, karras: bool, final: str) -> None:
    """Raises ValueError where this solver has no such option."""
    if karras and solver not in KARRAS:
        raise ValueError(f"{solver} has no Karras sigmas; {', '.join(KARRAS)} have")
    if final != "zero" and solver != "dpm++":
        raise ValueError(f"final is an option of dpm++, not of {solver}")


class FixedSolver(Strict):
    """A solver with settings fixed by hand."""

    solver: Solver
    """Which solver."""
    guidance_scale: Annotated[float, Field(ge=1)]
    """guidance_scale in the pipelines' convention. 1: unguided, in twice the steps."""
    spacing: Spacing = "trailing"
    """timestep_spacing of diffusers."""
    karras: bool = False
    """use_karras_sigmas of diffusers."""
    final: Final = "zero"
    """Last step of dpm++: final_sigmas_type, or euler_at_final, which goes to sigma_min too."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_options(self.solver, self.karras, self.final)
        return self


def _kind_of_entry(entry: object) -> str:
    return "[fixed]" if isinstance(entry, dict | FixedSolver) else "[name]"


# One kind is tried, so that a wrong entry has one error and not one for each kind.
SolverEntry = Annotated[
    Annotated[Solver, Tag("[name]")] | Annotated[FixedSolver, Tag("[fixed]")], Discriminator(_kind_of_entry)
]


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
    """Image features of the distance. efficientnet-lite0 sees pictures at 128 pixels and is refused for pictures above
    256; inception and clip are downloaded; efficientnet-lite0-crops brings its weights and sees crops at full size."""
    features_source: str | None = None
    """inception: a file of weights; clip: a hub id or a folder. null: their hubs."""
    check_features: Annotated[str, OneOf(FEATURES)] | None = "scattering"
    """Second features, by which all is measured once more, so that no claim hangs on one network. scattering are fixed
    wavelets on the full-sized picture, without weights. null: none."""
    check_features_source: str | None = None
    """As features_source, for check_features."""
    scores: tuple[Annotated[str, OneOf(SCORES)], ...] = ()
    """Scores by models of human preference or of text and picture. They are downloaded."""
    scores_source: dict[str, str] = {}
    """Hub id or folder for each score. Without one, its own hub."""
    guidance_scale: Annotated[float, Field(ge=1)] = 8.5
    """guidance_scale of the teacher in the pipelines' convention: w + 1 of distill's w."""
    teacher_steps: Positive = 50
    """DDIM steps of the teacher's pictures, which all else is compared with."""
    solvers: Annotated[tuple[SolverEntry, ...], Field(min_length=1)] = ("ddim", "dpm++", "unipc", "euler")
    """Solvers that the student is compared with. A name: its best settings are searched on validation captions. An
    object: they are fixed by hand, such as {solver: dpm++, guidance_scale: 4, spacing: trailing, karras: true}."""
    solver_evaluations: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 32)
    """Network evaluations for one picture with each solver. A guided step costs two, an unguided one costs one."""
    guidance_scales: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=1)] = (
        *(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    )
    """Guidance scales that are searched for the solvers."""
    choosing_pictures: Annotated[int, Field(ge=2)] = 128
    """Pictures by which the search compares two settings of a solver. It ranks them only, so they may be fewer than
    the features have dimensions."""
    student_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    """Steps with the student."""
    prompts: str | None = None
    """A file of your own prompts (.txt with one in each line, .jsonl, .csv or .parquet). They are drawn and compared as
    the test captions are, and reported in a section of their own. null: none."""
    worst_captions: Annotated[int, Field(ge=0)] = 10
    """The captions at which the student is farthest from the teacher, which the report shows."""
    grid_rows: Positive = 8
    """Rows of the contact sheet."""
    resamples: Annotated[int, Field(ge=0), AfterValidator(_none_or_several)] = 1000
    """Bootstrap resamples of captions and seeds for the confidence intervals. 0: no intervals."""
    latency_repeats: Positive = 20
    """Pictures drawn one by one with each method, to measure seconds per picture."""
    device: Device = "auto"
    """auto: the GPU where there is one."""

    @model_validator(mode="after")
    def _two_views(self) -> Self:
        if self.features == self.check_features:
            raise ValueError(f"check_features: {self.features} are the features already; set others, or null")
        return self

    @model_validator(mode="before")
    @classmethod
    def _replaced(cls, raw: object) -> object:
        if isinstance(raw, dict) and "solver_steps" in raw:
            raise ValueError(
                "solver_steps was replaced by solver_evaluations, which counts network evaluations: a guided step "
                "costs two of them, an unguided one costs one; `lcmlora upgrade` converts it"
            )
        return raw

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = self.solver_names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"solvers: {twice[0]} stands there twice")
        return self

    @property
    def solver_names(self) -> tuple[Solver, ...]:
        """The names of the solvers, whether their settings are searched or fixed by hand."""
        return tuple(entry.solver if isinstance(entry, FixedSolver) else entry for entry in self.solvers)


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


class AddedLora(Strict):
    """A style LoRA that is added at some weights."""

    source: Quotable
    """A .safetensors file that diffusers can load, or the folder of an adapter."""
    weights: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5, 1.0)
    """Weights of the LoRA. The acceleration has weight 1."""


class AddedControlNet(Strict):
    """A ControlNet of the base's family."""

    source: Quotable
    """Its folder, as diffusers saves it."""
    picture: Literal["edges", "picture"] = "edges"
    """What it is given of a real picture: its edges, or the picture itself."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """controlnet_conditioning_scale of diffusers."""


class AddedIpAdapter(Strict):
    """An IP-Adapter, which lets a picture stand beside the caption."""

    source: Quotable
    """The folder that has `subfolder`."""
    subfolder: str = "models"
    """Folder of the weights."""
    weight_name: str = "ip-adapter_sd15.safetensors"
    """File of the weights."""
    encoder: str = "image_encoder"
    """Folder of the image encoder, within `subfolder`."""
    scale: Annotated[float, Field(gt=0)] = 0.6
    """Weight of the picture beside the caption."""


class Compatibility(Strict):
    """The adapter together with what people add to the base (stage `compatibility`)."""

    models: tuple[Name, ...] = ()
    """Which of `models` are tried. The others are released without a table of compatibility."""
    steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 4, 8)
    """Steps of the student."""
    pictures: Annotated[int, Field(ge=2)] = 352
    """Pictures of each set, more than the features have dimensions. Most of the time goes into the teacher, which draws
    two sets with each addition."""
    loras: dict[Name, AddedLora] = {}
    """Style LoRAs by name."""
    img2img: tuple[Strength, ...] = (0.4, 0.7)
    """Strengths at which real pictures are drawn anew. Not tried without real pictures."""
    inpainting: bool = False
    """Whether one half of real pictures is drawn anew."""
    controlnets: dict[Name, AddedControlNet] = {}
    """ControlNets by name."""
    ip_adapters: dict[Name, AddedIpAdapter] = {}
    """IP-Adapters by name."""
    int8: bool = True
    """Whether the base is tried with the network's weights rounded to int8."""
    fp16_vae: bool = True
    """Whether the base is tried with its VAE in fp16."""
    limit: Annotated[float, Field(gt=1)] = 2.0
    """An addition fails where the student's excess with it is more than so many times its excess without it, beyond
    chance."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for key in ("steps", "img2img"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: a number stands there twice: {', '.join(f'{v:g}' for v in values)}")
        return self


class Limit(Strict):
    """What a mean score of the student must not be below or above. At least one of the two."""

    min: float | None = None
    """Lowest mean score that may become champion. null: no limit."""
    max: float | None = None
    """Highest one, for scores of which less is better. null: no limit."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("expected min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


class Gate(Strict):
    """When a candidate may become champion."""

    steps: Positive = 4
    """The student at this many steps must be nearer to the teacher than every solver at as many network
    evaluations."""
    beyond_chance: bool = True
    """The confidence interval of its lead over the best of these solvers must not include zero, as it does where there
    are few captions. Without intervals (evaluation.resamples: 0) the figures alone decide."""
    min_retrieval: Share = 0.8
    """Lowest caption retrieval@1 of the student, as a share of the teacher's."""
    min_diversity: Share = 0.85
    """Lowest diversity of the student's pictures of one caption, as a share of the teacher's: below it, seeds draw
    much the same. On the emoji base students of 1 to 16 steps had 0.94 to 1.05 of it, and guided solvers in one step,
    whose pictures of a caption are much the same blur, 0.79. Not asked for where each caption has one picture
    (evaluation.pictures). 0: no limit."""
    max_excess: float | None = None
    """Highest Frechet distance of the student above the floor, in the units of the features. null: no limit."""
    limits: dict[str, Limit] = {}
    """Limits for the student's mean scores, by their names in evaluation.scores: {clip-score: {min: 24}}. Own measures
    are added to these scores by an entry point (docs/evaluation.md)."""
    compatible: tuple[str, ...] = ()
    """Additions that must not fail at `steps`, by the names that stage `compatibility` gives them, such as `int8`,
    `img2img 0.7` or `lora ink 1`."""
    champion: bool = True
    """The candidate must not be worse than the champion by more than the confidence interval."""
    approval: Literal["none", "required"] | tuple[Name, ...] = "none"
    """Whether a person must approve a version that passed the gate before it becomes champion: `lcmlora approve`. A
    list has the models for which it is required."""
    approval_days: Annotated[float, Field(gt=0)] = 7.0
    """Days for approving. A version that nobody has approved by then counts as rejected."""

    def needs_approval(self, model: str) -> bool:
        """Returns whether a person must approve versions of this model."""
        return self.approval == "required" or (self.approval != "none" and model in self.approval)

    def deciding(self) -> JsonObject:
        """Returns the settings that decide by the figures alone, as a release's provenance has them."""
        return self.model_dump(mode="json", exclude={"approval", "approval_days"})
