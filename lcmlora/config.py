"""params.yaml -> frozen, strict, typed configuration. Every error names file, key, value and what was expected."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from lcmlora import names
from lcmlora.errors import UserError
from lcmlora.io.parsing import Malformed, parse_yaml, read_bytes
from lcmlora.io.terminal import shown
from lcmlora.plugins import FEATURES, OBJECTIVES, SCORES, SOURCES, Table

_MAX_BYTES = 1 << 20  # of params.yaml; ours has 10,000
_LARGEST = 1 << 53  # of integers; above it neither JSON nor a float has them all
_MOST_LINES = 20  # of a message

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Kind = Literal["style", "finetune"]
Solver = Literal["ddim", "dpm++", "unipc", "euler"]


@dataclass(frozen=True)
class OneOf:
    """Annotates a name of a table of classes (lcmlora/plugins.py)."""

    table: Table

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.table.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"examples": self.table.names}


def _named(name: str) -> str:
    if wrong := names.fault(name):
        raise ValueError(wrong)
    return name


def _several(count: int) -> int:
    if count == 1:
        raise ValueError("one has no spread; 0 for none, or at least 2")
    return count


def _as_text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _quotable(text: str) -> str:
    if found := re.search(r"[^ -~\u00a0-\U0010ffff]|[\"`<>|\\\u2028\u2029\ud800-\udfff]", text):
        raise ValueError(f"has {found[0]!a}, which cannot stand in a model card's text and examples")
    return text


Name = Annotated[str, AfterValidator(_named)]  # of what becomes a path, a command's word or a registry's entry
Quotable = Annotated[str, Field(max_length=1024), AfterValidator(_quotable)]  # of what is quoted in a card


class Strict(BaseModel):
    """Unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: yes` is true in YAML, and would be taken for 1."""
        if isinstance(value, bool) and info.field_name:
            kind = cls.model_fields[info.field_name].annotation
            if {int, float} & {kind, *get_args(kind)} and bool not in (kind, *get_args(kind)):
                raise ValueError(f"expected a number, not {str(value).lower()} (as yes, no, on and off are read)")
        return value


S = TypeVar("S", bound=Strict)


class Round(Strict):
    """How long one round of `pretrain` trains its two parts."""

    vae_steps: Positive
    unet_steps: Positive


class Pretrain(Strict):
    """How the embedded emoji base is made (stage `pretrain`, frozen)."""

    seed: Seed
    groups: tuple[str, ...]  # what the UNet sees, of `vae_groups`
    base_styles: tuple[str, ...]  # likewise, of `vae_styles`
    vae_groups: tuple[str, ...]
    vae_styles: tuple[str, ...]
    size: Positive
    copies: Positive
    vocabulary: Positive
    latent_channels: Positive
    vae_channels: tuple[int, ...]
    vae_batch: Positive
    vae_lr: float
    vae_kl: float
    text_width: Positive
    text_layers: Positive
    unet_channels: tuple[int, ...]
    batch: Positive
    lr: float
    ema: Share
    caption_dropout: Share
    # Each goes on from the averaged weights of the last one, with a fresh optimizer and the rate's whole course.
    rounds: Annotated[tuple[Round, ...], Field(min_length=1)]
    checkpoint_every: Positive


class Range(Strict):
    """Where a number must lie; without a bound, anywhere."""

    min: float | None = None
    max: float | None = None


def _splits(value: Any) -> Any:
    """One name may stand without brackets, and `all` is every one."""
    if value == "all":
        return ("train", "validation", "test")
    return (value,) if isinstance(value, str) else value


Split = Literal["train", "validation", "test"]
Splits = Annotated[tuple[Split, ...], BeforeValidator(_splits), Field(min_length=1)]


class Data(Strict):
    """Which captioned pictures, and which of them are kept (stage `prepare`)."""

    source: Annotated[str, OneOf(SOURCES)]  # emoji, folder, parquet, webdataset, prompts, or one that was added
    # folder: the folder; parquet, webdataset: a file or a folder of them, here or at s3://; emoji: the
    # package-lock.json beside node_modules; prompts: a text file with a prompt in each line, here or at s3://
    path: Annotated[str, BeforeValidator(_as_text)]
    groups: tuple[str, ...] = ()  # emoji
    styles: tuple[str, ...] = ()  # emoji
    copies: Positive = 1  # emoji: placements drawn of each drawing; prompts: latents that the teacher makes of each
    min_side: Positive  # pixels; smaller pictures are dropped
    max_aspect: Annotated[float, Field(ge=1)]  # longer side over shorter; what is longer is dropped
    scores: dict[str, Range] = {}  # numbers that metadata, tables or JSON have of a picture; what has none is dropped
    # Bits of 64 in which the looks of two pictures may differ and the later is dropped; null drops equal bytes alone.
    near_duplicates: Annotated[int, Field(ge=0, le=8)] | None = None
    split: Splits = ("train",)  # which parts are taken, where names like test/ or val-0001.tar say so; or all
    # Where links may lead besides the data folder and DVC's cache: nowhere, within the project's folder, anywhere
    links: Literal["refuse", "project", "follow"] = "project"
    # Share of the rows, files and samples read that may be damaged or refused; above it the run stops. Without a
    # caption may be half at most, whatever this says below 1: more, and the layout is another one.
    max_rejected: Share = 0.8
    validation: Annotated[float, Field(gt=0, lt=1)]  # share of captions that training never sees
    seed: Seed


class Rollouts(Strict):
    """How the teacher makes latents of prompts without pictures: guided DDIM (lcmlora/data/latents/rollouts.py)."""

    steps: Positive = 50  # the points of its grid
    w: Annotated[float, Field(ge=0)] = 7.5  # guidance as in `distill`
    states: bool = False  # keep all states on the way, for distill.trajectory: the cache is then so much larger


class Encode(Strict):
    """The latent cache (stage `encode`)."""

    batch: Positive
    rollouts: Rollouts = Rollouts()  # of source prompts
    shard_mb: Positive = 256
    shards: str | None = None  # s3://bucket/prefix that takes the shards; without it the cache has them itself
    aspect_buckets: bool = False  # pictures are cropped to a shape close to their own, not to the square
    bucket_pictures: Positive = 64  # a shape with fewer gives them to its neighbour
    text_cache_mb: Positive = 2000  # embeddings of distinct captions; more are computed in every step of training
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Training(Strict):
    """A run of the training loop (lcmlora/training/loop.py)."""

    seed: Seed
    steps: Positive
    batch: Positive  # pictures in a step, over all processes
    accumulate: Positive = 1  # forwards into which each process divides its pictures of a step
    lr: Annotated[float, Field(gt=0)]
    warmup: Annotated[int, Field(ge=0)]
    cooldown: Share  # last share of the steps, over which the rate falls linearly to zero
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedule-free"] = "adamw"
    ema: Annotated[float, Field(ge=0, lt=1)]  # of the weights; the average is what is validated and saved
    empty_prompts: Share = 0.0  # share of the samples that are given the unconditional embedding
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Activations computed again in the backward pass; auto: selective on a GPU, none on a CPU, where time is shorter.
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Positive
    log_every: Positive
    validate_every: Positive
    validation_pictures: Positive  # kept from training, by caption; at most a tenth of the cache
    window: Positive = (
        1 << 18
    )  # pictures that are mixed with each other, where there are more (lcmlora/data/latents/plan.py)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.window < self.batch:
            raise ValueError(f"window {self.window} is less than batch {self.batch}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch {self.batch}")
        if self.optimizer == "schedule-free" and self.cooldown:
            raise ValueError(f"cooldown must be 0 with optimizer schedule-free, got {self.cooldown}")
        return self


class Distill(Training):
    """Distillation of the adapter (stage `distill`); the objectives: lcmlora/diffusion/objectives.py."""

    objective: Annotated[str, OneOf(OBJECTIVES)]  # lcm, tcd, pcm, tdd, or one that was added
    phases: Positive = 4  # pcm: the student's steps are trained for this many
    gamma: Share = 0.3  # tcd, tdd: how far a step goes below the next timestep before noise takes it back up
    target: Literal["stop-gradient", "ema"] = "stop-gradient"  # whose weights the target is computed with
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    # The papers' w: c + w (c - u). The pipelines' guidance_scale is w + 1.
    w_min: Annotated[float, Field(ge=0)]
    w_max: Annotated[float, Field(ge=0)]
    grid: Positive  # DDIM timesteps, N of Algorithm 1
    huber_c: Annotated[float, Field(gt=0)]
    weighting: Literal["uniform", "snr+1"]  # of a sample's loss, by its timestep
    # Shares of the steps whose noisy states are no noised latents:
    trajectory: Share = 0.0  # those of the teacher's rollouts, which the cache then holds; no teacher's pass is needed
    rollout: Share = 0.0  # those that the student's own first one or two jumps lead to, on policy

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.trajectory + self.rollout > 1:
            raise ValueError(f"trajectory {self.trajectory} and rollout {self.rollout} are shares and add up to over 1")
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is above w_max {self.w_max}")
        if self.phases > self.grid:
            raise ValueError(f"phases {self.phases} is more than the {self.grid} timesteps of grid")
        return self


class Tuning(Training):
    """A style by the ordinary diffusion loss: a LoRA, or a whole checkpoint without a rank (`finetune`)."""

    rank: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None  # the rank, where it is left out


class Launch(Strict):
    """On how many processes an adapter is distilled. The result does not depend on it, but for rounding."""

    processes: Positive = 1  # on each machine, one for each GPU
    machines: Positive = 1  # each runs the same command on the same files
    rendezvous: str | None = None  # host:port on one of the machines that all of them reach

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.machines > 1 and not self.rendezvous:
            raise ValueError(f"rendezvous (host:port) is needed for {self.machines} machines")
        return self


class Evaluation(Strict):
    """What is drawn and measured (stages `reference` and `evaluate`)."""

    seed: Seed
    pictures: Annotated[int, Field(ge=2)]
    batch: Positive
    features: Annotated[str, OneOf(FEATURES)]  # efficientnet-lite0, inception, clip, or some that were added
    features_source: str | None = None  # inception: a file of weights; clip: a hub id or a folder
    scores: tuple[Annotated[str, OneOf(SCORES)], ...] = ()  # clip-score, image-reward, hps, or some that were added
    scores_source: dict[str, str] = {}  # hub id or folder by score
    guidance_scale: Annotated[float, Field(ge=1)]  # teacher and solvers, the pipelines' convention (w + 1)
    teacher_steps: Positive
    solvers: Annotated[tuple[Solver, ...], Field(min_length=1)]
    solver_steps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    student_steps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    grid_rows: Positive
    resamples: Annotated[int, Field(ge=0), AfterValidator(_several)] = 200  # of the bootstrap; 0: no intervals
    latency_repeats: Positive = 20  # pictures drawn alone, for each method
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Study(Strict):
    """The universal module measured: the adapter added to styles and fine-tuned checkpoints (stage `study`)."""

    models: tuple[Name, ...] = ()  # of `models`; the others are released without a study
    styles: tuple[Name, ...] = ()  # of `styles`; a LoRA of each is trained for each of the models
    finetunes: tuple[Name, ...] = ()  # of `finetunes`; likewise a whole checkpoint
    pictures: Annotated[int, Field(ge=2)]  # of a style, with each method
    real: dict[str, Any] = {}  # overrides of a style's data for the pictures that it is measured against
    weights: tuple[float, float]  # lambda1 of the style and lambda2 of the acceleration, eq. (3) of arXiv 2311.05556
    solver_steps: Annotated[tuple[Positive, ...], Field(min_length=1)]  # of the style alone, under DPM-Solver++
    student_steps: Annotated[tuple[Positive, ...], Field(min_length=1)]  # of the style accelerated
    steps: Positive  # at which all is compared at equal cost, and guidance and weights vary
    guidance_scales: tuple[Annotated[float, Field(gt=1)], ...] = ()  # of the student
    grid_style: str | None = None  # of `styles`, for the grid of weights; the first one if left out
    grid_style_weights: tuple[float, ...] = ()
    grid_adapter_weights: tuple[float, ...] = ()

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

    steps: Positive  # the student at this many steps must beat every solver at as many network evaluations
    min_retrieval: Share  # caption retrieval@1 as a share of the teacher's
    max_excess: float | None = None  # of the student over the floor, in the units of the features; null asks for none
    champion: bool = True  # it must not be worse than the champion by more than the confidence interval


class Registry(Strict):
    """MLflow: where runs and models are kept."""

    # MLFLOW_TRACKING_URI, where it is set, goes before it. It may hold a password, so that no text of settings has it.
    tracking_uri: Annotated[str, Field(repr=False)]
    # Of MLflow; where it keeps experiments in folders, as on Databricks, with the folders before it.
    experiment: Annotated[
        str, Field(max_length=256, pattern=r"^/?[A-Za-z0-9][A-Za-z0-9._@ -]*(/[A-Za-z0-9][A-Za-z0-9._@ -]*)*$")
    ]
    alias: Name  # of the registry, and the channel of the published releases
    system_metrics: bool = True  # CPU, memory, GPU and network while a model is distilled

    @field_validator("alias")
    @classmethod
    def _alias_of_mlflow(cls, alias: str) -> str:
        if "." in alias or alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
            raise ValueError("is no alias: MLflow takes none with '.', nor `latest`, nor `v` with a number")
        if alias.lower() == "previous":
            raise ValueError("is no alias of its own: `previous` is that of the champion before the present one")
        return alias


class Publish(Strict):
    """Where releases go: a directory or s3://bucket/prefix."""

    to: str
    endpoint_url: str | None = None  # of MinIO, R2, SeaweedFS, ...; AWS_ENDPOINT_URL does as well
    region: str | None = None
    encryption: Literal["AES256", "aws:kms"] | None = None  # by the server, of every object
    kms_key: str | None = None
    tags: Annotated[dict[str, str], Field(max_length=10)] = {}  # of every object
    signing_key: str | None = None  # PEM file of a private key; releases are then signed
    verify_key: str | None = None  # PEM file of its public key; unsigned releases are then refused

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        if self.kms_key is not None and self.encryption != "aws:kms":
            raise ValueError(f"kms_key goes with encryption aws:kms, and encryption is {self.encryption}")
        return self


class Flow(Strict):
    """How the Prefect flows run all this. No result depends on it."""

    gpu_limit: Name = "gpu"  # Prefect's concurrency limit that whatever trains or draws holds, one at a time
    models_at_once: Positive = 4
    retries: Annotated[int, Field(ge=0)] = 3  # of what needs the network
    retry_seconds: Annotated[float, Field(gt=0)] = 5.0  # before the first retry, doubled for each further one
    timeout_hours: Annotated[float, Field(gt=0)] = 72.0  # of a stage

    @property
    def limit(self) -> str:
        """The limit's name; LCMLORA_GPU_LIMIT, which a worker with GPUs of its own sets, goes before `gpu_limit`."""
        return names.check(os.environ.get("LCMLORA_GPU_LIMIT") or self.gpu_limit, "LCMLORA_GPU_LIMIT")


class Merged(Strict):
    """A LoRA that is summed into a base."""

    source: Quotable  # a .safetensors file in any spelling, or the folder of an adapter
    weight: float = 1.0


class Base(Strict):
    """A base model. Only what differs between bases and cannot be read from its own folder."""

    source: Quotable  # hub id, a diffusers folder, or a .safetensors file in the original layout
    # Hub commit; required for a hub id, so that a run can be repeated.
    revision: (
        Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]
        | None
    ) = None
    config: str | None = None  # single file: the diffusers folder or hub id whose configurations it goes with
    variant: Name | None = None  # e.g. fp16
    style: Merged | None = None  # of a LoRA that the model is distilled with
    resolution: Positive  # pixels, width and height of the training pictures
    license: Quotable
    # Overrides of the stages' settings for this base.
    encode: dict[str, Any] = {}
    launch: dict[str, Any] = {}
    distill: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}

    @model_validator(mode="after")
    def _config_of_a_file(self) -> Self:
        if self.config is not None and not self.source.endswith(".safetensors"):
            raise ValueError(f"config goes with a .safetensors source, and source is {self.source}")
        return self


class Variation(Strict):
    """A style: the pictures it is learned from, and what differs in its training."""

    data: dict[str, Any] = {}  # overrides of `data`
    training: dict[str, Any] = {}  # overrides of `style` or `finetune`


class Config(Strict):
    """All of params.yaml."""

    models: tuple[Name, ...]
    pretrain: Pretrain
    data: Data
    encode: Encode
    launch: Launch = Launch()
    teacher_cache_gb: Annotated[float, Field(ge=0)] = (
        0.0  # of disk, for each model (lcmlora/diffusion/teacher_cache.py)
    )
    shard_cache_gb: Annotated[float, Field(gt=0)] = (
        50.0  # of disk, for shards out of a bucket (lcmlora/data/latents/shards.py)
    )
    distill: Distill
    evaluation: Evaluation
    gate: Gate
    registry: Registry
    publish: Publish
    flow: Flow = Flow()
    bases: dict[Name, Base]
    style: Tuning | None = None
    styles: dict[Name, Variation] = {}
    finetune: Tuning | None = None
    finetunes: dict[Name, Variation] = {}
    study: Study | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for key in ("bases", "styles", "finetunes"):
            if two := names.twins(getattr(self, key)):
                raise ValueError(f"{key}: {two[0]} and {two[1]} are one folder where file names have no case")
        registered = [model.removeprefix("lcm-lora-") for model in dict.fromkeys(self.models)]
        if twice := [name for name in registered if registered.count(name) > 1]:
            raise ValueError(f"models: {twice[0]} and lcm-lora-{twice[0]} would be registered under one name")
        return self

    @model_validator(mode="after")
    def _models_exist(self) -> Self:
        for model in self.models:
            if model not in self.bases:
                raise ValueError(f"models: no base named {model!r}; bases has {', '.join(self.bases)}")
        if self.style and self.style.rank is None:
            raise ValueError("style.rank: a style is a LoRA and needs a rank; a whole checkpoint is made by finetune")
        if self.finetune and self.finetune.rank is not None:
            raise ValueError("finetune.rank: a whole checkpoint has no rank; a LoRA is made by style")
        for key in ("models", "styles", "finetunes") if self.study else ():
            for name in getattr(self.study, key):
                if name not in getattr(self, key):
                    raise ValueError(f"study.{key}: {name!r} is not among {key}: {', '.join(getattr(self, key))}")
        return self

    def base(self, model: str) -> Base:
        """Returns the base of this name. Raises UserError naming the known ones."""
        if names.check(model, "model") not in self.bases:
            raise UserError(f"unknown model {model!r}; params.yaml has bases {', '.join(self.bases)}")
        return self.bases[model]

    def encode_for(self, model: str) -> Encode:
        return _override(self.encode, self.base(model).encode, f"bases.{model}.encode")

    def launch_for(self, model: str) -> Launch:
        """Raises UserError where the processes do not divide the batch."""
        launch = _override(self.launch, self.base(model).launch, f"bases.{model}.launch")
        distill, ranks = self.distill_for(model), launch.processes * launch.machines
        if distill.batch % (ranks * distill.accumulate):
            raise UserError(
                f"{model}: distill.batch {distill.batch} cannot be divided among {ranks} processes (launch) with "
                f"{distill.accumulate} forwards each (distill.accumulate)"
            )
        return launch

    def distill_for(self, model: str) -> Distill:
        return _override(self.distill, self.base(model).distill, f"bases.{model}.distill")

    def variation(self, kind: Kind, name: str) -> tuple[Data, Tuning]:
        """Returns the pictures and the training that an entry of `styles` or `finetunes` asks for.

        Raises:
            UserError: there is no such entry, or no section that says how it is trained.
        """
        known, defaults = (self.styles, self.style) if kind == "style" else (self.finetunes, self.finetune)
        if names.check(name, kind) not in known:
            raise UserError(f"unknown {kind} {name!r}; params.yaml `{kind}s` has {', '.join(known) or 'none'}")
        if defaults is None:
            raise UserError(f"params.yaml: {kind}: is missing, it says how `{kind}s` are trained")
        entry = known[name]
        data = _override(self.data, entry.data, f"{kind}s.{name}.data")
        return data, _override(defaults, entry.training, f"{kind}s.{name}.training")

    def real_pictures(self, kind: Kind, name: str) -> Data:
        """Returns the pictures that a style or fine-tune is measured against: its own, with the study's overrides.

        Raises:
            UserError: it has none.
        """
        data, _ = self.variation(kind, name)
        if not SOURCES.get(data.source).has_pictures:
            raise UserError(
                f"{kind}s.{name}.data.source: {data.source} has no pictures, and a {kind} is learned from some"
            )
        return _override(data, self.study.real if self.study else {}, "study.real")

    def studied(self, model: str) -> list[tuple[Kind, str]]:
        """Returns the styles and fine-tunes with which this model is studied."""
        if self.study is None or model not in self.study.models:
            return []
        return [("style", name) for name in self.study.styles] + [("finetune", name) for name in self.study.finetunes]

    def evaluation_for(self, model: str) -> Evaluation:
        return _override(self.evaluation, self.base(model).evaluation, f"bases.{model}.evaluation")


def check_trajectory(settings: Distill, rollouts: Rollouts | None, where: str = "") -> None:
    """Raises UserError where a distillation on the teacher's trajectories does not go with the teacher's rollouts.

    Args:
        rollouts: how they were made; None where the data are pictures.
        where: what the message begins with.
    """
    if not settings.trajectory:
        return
    if rollouts is None or not rollouts.states:
        raise UserError(
            f"{where}distill.trajectory: {settings.trajectory:g} needs data.source: prompts, and "
            "encode.rollouts.states: true"
        )
    if rollouts.steps != settings.grid:
        raise UserError(
            f"{where}encode.rollouts.steps: {rollouts.steps} is not distill.grid, {settings.grid}, whose steps count"
        )
    if not settings.w_min <= rollouts.w <= settings.w_max:
        raise UserError(
            f"{where}encode.rollouts.w: {rollouts.w:g} is not within distill.w_min {settings.w_min:g} and w_max "
            f"{settings.w_max:g}"
        )


def _override(settings: S, changes: dict[str, Any], where: str) -> S:
    try:
        return type(settings).model_validate(_merged(settings.model_dump(), changes))
    except ValidationError as error:
        raise UserError(_explain(where, error)) from None


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings with the changes; of settings within settings with those that are changed."""
    within = {
        k: _merged(settings[k], v)
        for k, v in changes.items()
        if isinstance(v, dict) and isinstance(settings.get(k), dict)
    }
    return settings | changes | within


def _explain(where: str, error: ValidationError) -> str:
    """One line per error: the key, the value that stands there, and what was expected."""
    lines = []
    for item in error.errors():
        key = ".".join(shown(part, 80) for part in item["loc"] if part != "[key]")
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: {key}: there is no such key")
        elif item["type"] == "missing":
            lines.append(f"{where}: {key}: is missing")
        else:
            value = "" if item["loc"] == () else f" got {shown(repr(item['input']), 200)}:"
            told = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {key + ':' + value + ' ' if key else ''}{told}")
    more = [f"{where}: and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(lines[:_MOST_LINES] + more)


def load(path: Path = Path("params.yaml")) -> Config:
    """Returns the configuration in `path`.

    MLFLOW_TRACKING_URI goes before `registry.tracking_uri`: an address with a password does not belong into a file.
    LCMLORA_PUBLISH_TO goes before `publish.to`, so that `make up` can lead to the bucket that it serves.

    Raises:
        UserError: the file is missing, is not YAML, or holds a key or value that does not fit.
    """
    raw = _read(path)
    if (uri := os.environ.get("MLFLOW_TRACKING_URI")) and isinstance(raw.get("registry"), dict):
        raw["registry"]["tracking_uri"] = uri
    if (to := os.environ.get("LCMLORA_PUBLISH_TO")) and isinstance(raw.get("publish"), dict):
        raw["publish"]["to"] = to
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(str(path), error)) from None
    try:
        _check_overrides(config)
    except UserError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return config


def _read(path: Path) -> dict[str, Any]:
    """Returns what is in the file, with values that can stand in settings. Raises UserError."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; run in the project's folder or name it with --params")
    try:
        raw = parse_yaml(read_bytes(path, limit=_MAX_BYTES))
    except Malformed as error:
        told = str(error)
        raise UserError(f"{path}: {'is ' if told.startswith('not ') else ''}{told}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {'nothing' if raw is None else _kind(raw)}")
    _check_plain(raw, str(path))
    return raw


def _check_plain(value: Any, where: str) -> None:
    """Raises UserError where a key is no text, or a value is one that no setting has, naming where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                told = shown(repr(key), 80)
                raise UserError(f"{where}: the key {told} is no text ({_kind(key)}); put it in quotes")
            _check_plain(inner, f"{where}: {shown(key, 80)}" if where.count(": ") == 0 else f"{where}.{shown(key, 80)}")
    elif isinstance(value, list | tuple | set):
        for number, inner in enumerate(value):
            _check_plain(inner, f"{where}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: got {value}: expected a finite number")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise UserError(f"{where}: got a number of {value.bit_length()} bits: expected one up to {_LARGEST}")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{where}: got {shown(repr(value), 200)}: a zero byte, which no name and no path has")
    elif not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: got {shown(repr(value), 200)} ({_kind(value)}): put it in quotes, if it is a text")


def _kind(value: object) -> str:
    kinds = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _check_overrides(config: Config) -> None:
    """Raises UserError where a section of a base, a style or the study does not fit; here, and not hours later."""
    for model in config.bases:
        config.encode_for(model), config.launch_for(model), config.evaluation_for(model)
    for model in config.models:
        encoding, batch = config.encode_for(model), config.distill_for(model).batch
        if encoding.aspect_buckets and encoding.bucket_pictures < 2 * batch:
            raise UserError(
                f"{model}: encode.bucket_pictures: {encoding.bucket_pictures} is less than two batches (distill.batch "
                f"{batch}); pictures of a shape that do not fill a batch are never seen"
            )
        if (distill := config.distill_for(model)).trajectory:
            has_pictures = SOURCES.get(config.data.source).has_pictures
            check_trajectory(distill, None if has_pictures else encoding.rollouts, f"{model}: ")
    for name in config.styles:
        config.variation("style", name)
    for name in config.finetunes:
        config.variation("finetune", name)
    for model in config.study.models if config.study else ():
        for kind, name in config.studied(model):
            config.real_pictures(kind, name)


def digest(*settings: BaseModel | dict[str, Any] | str) -> str:
    """Returns a SHA-256 over settings, equal for equal settings whatever their order of keys."""
    plain = [s.model_dump(mode="json") if isinstance(s, BaseModel) else s for s in settings]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
