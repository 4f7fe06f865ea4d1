"""The stages: the version of each one's algorithm, and which settings decide its result.

A stage is run again when its inputs, the settings below or a version change (docs/staleness.md). Inputs are files and
stand in dvc.yaml. Settings and versions stand in resolved.yaml (lcmlora/dvc_files/resolved.py), which DVC reads as
parameters.

Settings that change results by rounding at most are left out: devices, processes, sizes of caches, intervals of
checkpoints and logs, the number of pictures drawn at once, the number of latency measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lcmlora.config import Base, Config, Data, Kind, Training
from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject
from lcmlora.settings.pretrain import Recipe

Settings = dict[str, JsonObject]  # of a stage, by section: base, data, encode, ...

# Raise a version if the same inputs and settings give another result, and only then, by
# `python -m tests.stages.raise_version STAGE`. The golden tests in tests/stages say when.
VERSIONS = {
    "pretrain": 1,  # the embedded base: how its VAE, text encoder and UNet are trained
    "prepare": 2,  # which pictures are kept, their captions, how they are split
    "encode": 1,  # latents and embeddings: resizing, the VAE's scaling, teacher rollouts, the layout of the cache
    "reference": 3,  # what the teacher and the solvers draw, image features, scores
    "distill": 1,  # objectives, teacher, samples, optimization, which weights are saved
    "polish": 1,  # distribution matching, and by which pictures the weights are chosen
    "evaluate": 2,  # how the student draws, and the metrics
    "style": 1,  # training of style LoRAs
    "finetune": 1,  # training of whole checkpoints
    "alone": 1,  # what styles and checkpoints draw without the adapter
    "study": 2,  # what they draw with it, and the metrics
    "compatibility": 1,  # what the student and the teacher draw with additions to the base, and the metrics
    "package": 4,  # files of the release: formats, card, report, reload check
}

# Stages that do the work of other stages themselves, whose versions decide their results, too.
_NESTED_ALGORITHMS = {"style": ("prepare", "encode"), "finetune": ("prepare", "encode"), "alone": ("prepare",)}

_LOADING_FIELDS = ("resolution", "variant")  # of a base, for a stage that only loads it: its files are an input
_IDENTITY_FIELDS = ("source", "revision", "style", *_LOADING_FIELDS)  # of a base, which the adapter's metadata name
# Settings without influence on results but for rounding:
_IRRELEVANT_TO_TRAINING = ("device", "checkpointing", "checkpoint_every", "log_every")
_IRRELEVANT_TO_DRAWING = ("device", "batch", "latency_repeats")


@dataclass(frozen=True)
class Run:
    """One run of a stage: of the project, of a model, or of a model with a style or a fine-tune."""

    stage: str
    model: str | None = None
    name: str | None = None  # of the style or fine-tune


def algorithms(stage: str) -> dict[str, int]:
    """Returns the versions of all algorithms that decide a stage's result, its own last."""
    return {name: VERSIONS[name] for name in (*_NESTED_ALGORITHMS.get(stage, ()), stage)}


def runs(config: Config) -> list[Run]:
    """Returns all runs that dvc.yaml has with this configuration."""
    found = [Run("pretrain"), *([Run("prepare")] if config.uses_shared_data() else [])]
    for model in config.models:
        found += [Run("prepare", model)] if config.has_own_data(model) else []
        polish = ("polish",) if config.distill_for(model).polish else ()
        found += [Run(stage, model) for stage in ("encode", "reference", "distill", *polish, "evaluate", "package")]
    for model in config.study.models if config.study else ():
        for kind, name in config.studied(model):
            found += [Run(kind, model, name), Run("alone", model, name)]
        found.append(Run("study", model))
    tried = config.compatibility.models if config.compatibility else ()
    return found + [Run("compatibility", model) for model in tried]


def polished(config: Config) -> list[str]:
    """Returns the models whose adapters are polished after the distillation."""
    return [model for model in config.models if config.distill_for(model).polish]


def decisive_settings(config: Config, run: Run) -> Settings:
    """Returns the settings that decide the result of a run, as plain data.

    Raises:
        UserError: params.yaml has no such model, style or fine-tune.
    """
    return _DECISIVE[run.stage](config, run)


def _pretrain(config: Config, run: Run) -> Settings:
    return {"pretrain": Recipe().model_dump(mode="json", exclude={"checkpoint_every"})}


def _prepare(config: Config, run: Run) -> Settings:
    data = config.data if run.model is None else config.data_for(run.model)
    return {"data": data.model_dump(mode="json")}


def _encode(config: Config, run: Run) -> Settings:
    encode = config.encode_for(_model(run))
    return {
        "base": _base(config, run, _LOADING_FIELDS),
        # Which pictures there are, and their captions, is an input.
        "data": config.data_for(_model(run)).model_dump(mode="json", include={"source", "max_aspect"}),
        "encode": encode.model_dump(mode="json", exclude={"device"}),
    }


def _reference(config: Config, run: Run) -> Settings:
    return {
        "base": _base(config, run, _LOADING_FIELDS),
        "data": _source(config.data_for(_model(run))),
        "evaluation": _evaluation(config, run, "student_steps", "resamples", "worst_captions"),
    }


def _distill(config: Config, run: Run) -> Settings:
    distill = config.distill_for(_model(run)).alone()
    return {"base": _base(config, run, _IDENTITY_FIELDS), "distill": _training(distill)}


def _polish(config: Config, run: Run) -> Settings:
    judging = {"seed", "features", "features_source", "guidance_scale", "teacher_steps", "choosing_pictures"}
    return {
        "base": _base(config, run, _IDENTITY_FIELDS),
        "distill": _training(config.distill_for(_model(run))),
        "evaluation": config.evaluation_for(_model(run)).model_dump(mode="json", include=judging),
    }


def _evaluate(config: Config, run: Run) -> Settings:
    return {
        "base": _base(config, run, _LOADING_FIELDS),
        "data": _source(config.data_for(_model(run))),
        "evaluation": _evaluation(config, run),
        "gate": config.gate.model_dump(mode="json", include={"steps"}),  # at which the worst captions are shown
    }


def _tune(config: Config, run: Run) -> Settings:
    data, training = config.variation(_model(run), "style" if run.stage == "style" else "finetune", _name(run))
    encode = config.encode_for(_model(run))
    return {
        "base": _base(config, run, _IDENTITY_FIELDS),
        "data": data.model_dump(mode="json"),
        "encode": encode.model_dump(mode="json", exclude={"device", "shards"}),
        "training": _training(training),
    }


def _alone(config: Config, run: Run) -> Settings:
    kind = studied_kind(config, _model(run), _name(run))
    study = config.study
    assert study is not None
    drawing = {"seed", "features", "features_source", "guidance_scale", "solvers", "grid_rows"}
    return {
        "base": _base(config, run, _LOADING_FIELDS),
        "data": config.real_pictures(kind, _name(run)).model_dump(mode="json"),
        "evaluation": config.evaluation_for(_model(run)).model_dump(mode="json", include=drawing),
        "study": study.model_dump(mode="json", include={"pictures", "solver_steps", "steps"}),
    }


def _study(config: Config, run: Run) -> Settings:
    study = config.study
    if study is None:
        raise UserError("params.yaml: study: is missing")
    return {
        "base": _base(config, run, _LOADING_FIELDS),
        "evaluation": _evaluation(config, run, "worst_captions", "check_features", "check_features_source"),
        # Which other models are studied, and with what real pictures, decides nothing here: those are inputs.
        "study": study.model_dump(mode="json", exclude={"models", "real"}),
    }


def _compatibility(config: Config, run: Run) -> Settings:
    if config.compatibility is None:
        raise UserError("params.yaml: compatibility: is missing")
    # The student's noise goes by batches.
    drawing = {"seed", "features", "features_source", "guidance_scale", "teacher_steps", "resamples", "batch"}
    return {
        "base": _base(config, run, _LOADING_FIELDS),
        "data": _source(config.data_for(_model(run))),
        "evaluation": config.evaluation_for(_model(run)).model_dump(mode="json", include=drawing),
        # Of the files of additions their content decides, not their names.
        "compatibility": config.compatibility.model_dump(mode="json", exclude={"models"})
        | {"files": config.digests_of_additions()},
    }


def _package(config: Config, run: Run) -> Settings:
    precision, author = config.distill_for(_model(run)).precision, config.base(_model(run)).author
    return {
        "base": _base(config, run, (*_IDENTITY_FIELDS, "license", *(["author"] if author else []))),
        "distill": {"precision": precision},
        "gate": config.gate.deciding(),
    }


_DECISIVE: dict[str, Callable[[Config, Run], Settings]] = {
    "pretrain": _pretrain,
    "prepare": _prepare,
    "encode": _encode,
    "reference": _reference,
    "distill": _distill,
    "polish": _polish,
    "evaluate": _evaluate,
    "style": _tune,
    "finetune": _tune,
    "alone": _alone,
    "study": _study,
    "compatibility": _compatibility,
    "package": _package,
}


def studied_kind(config: Config, model: str, name: str) -> Kind:
    """Returns whether `name` is a style or a fine-tune of this model's study. Raises UserError if it is neither."""
    kinds = {studied: kind for kind, studied in config.studied(model)}
    if name not in kinds:
        known = ", ".join(kinds) or "nothing"
        raise UserError(f"{name!r} is not studied with {model}; params.yaml `study` has {known}")
    return kinds[name]


def _model(run: Run) -> str:
    assert run.model is not None, f"{run.stage} is run for a model"
    return run.model


def _name(run: Run) -> str:
    assert run.name is not None, f"{run.stage} is run for a style or a fine-tune"
    return run.name


def _base(config: Config, run: Run, fields: tuple[str, ...]) -> JsonObject:
    base: Base = config.base(_model(run))
    return base.model_dump(mode="json", include=set(fields))


def _source(data: Data) -> JsonObject:
    return data.model_dump(mode="json", include={"source"})


def _training(training: Training) -> JsonObject:
    return training.model_dump(mode="json", exclude=set(_IRRELEVANT_TO_TRAINING))


def _evaluation(config: Config, run: Run, *unused: str) -> JsonObject:
    """Returns the decisive settings of an evaluation. Of the file of own prompts its content decides, not its name."""
    evaluation = config.evaluation_for(_model(run)).model_dump(mode="json", exclude={*_IRRELEVANT_TO_DRAWING, *unused})
    return evaluation | {"prompts": config.prompts_digest(_model(run))}
