"""params.yaml -> frozen, strict, typed configuration. Every error names file, key, value and what was expected.

The settings themselves are in lcmlora/settings. A setting of a model comes from the last of these that has it: its
default, the preset of the base's family, a section of params.yaml, the section of the base's entry there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from lcmlora import names
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file, sha256_folder
from lcmlora.io.parsing import JsonObject, Malformed, check_plain, kind_of, parse_yaml, read_bytes
from lcmlora.io.terminal import shown
from lcmlora.plugins import SOURCES
from lcmlora.settings import layers, presets
from lcmlora.settings.bases import Base, Merged, Variation
from lcmlora.settings.data import Data, Encode, Range, Rollouts, Split
from lcmlora.settings.evaluation import Compatibility, Evaluation, FixedSolver, Gate, Solver, Study
from lcmlora.settings.fields import Kind, Name, Positive, Quotable, Strict
from lcmlora.settings.layers import Changes, Layer, S
from lcmlora.settings.operation.notify import Notify
from lcmlora.settings.operation.serving import Serving
from lcmlora.settings.services import Costs, Flow, Publish, Registry, Retention
from lcmlora.settings.training import (
    Distill,
    FinetuneTraining,
    Launch,
    StyleTraining,
    Training,
    Tuning,
    check_trajectory,
    distill_settings,
    extended_distill_settings,
)

__all__ = [
    "Base",
    "Compatibility",
    "Config",
    "Data",
    "Distill",
    "Encode",
    "Evaluation",
    "FixedSolver",
    "Flow",
    "Gate",
    "Kind",
    "Launch",
    "Merged",
    "Name",
    "Notify",
    "Positive",
    "Publish",
    "Quotable",
    "Range",
    "Registry",
    "Rollouts",
    "Serving",
    "Solver",
    "Split",
    "Strict",
    "Study",
    "Training",
    "Tuning",
    "Variation",
    "check_trajectory",
    "digest",
    "distill_settings",
    "load",
]

_MAX_BYTES = 1 << 20  # of params.yaml; ours has 3,000
_SMALL_FEATURES, _SMALL_PICTURES = "efficientnet-lite0", 256  # features for pictures of up to so many pixels

# Sections whose settings a model may have of its own: from its family, from params.yaml, from its base's entry there.
SECTIONS: dict[str, type[Strict]] = {
    "encode": Encode,
    "launch": Launch,
    "distill": Distill,
    "evaluation": Evaluation,
    "style": StyleTraining,
    "finetune": FinetuneTraining,
}
_OWN = ("data", "encode", "launch", "distill", "evaluation")  # which the base's entry may change


class Config(Strict):
    """All of params.yaml, with the published bases."""

    models: tuple[Name, ...]
    """Models that the pipeline makes: names of entries of `bases`, or of published bases."""
    data: Data
    """The captioned pictures, and which of them are kept (stage `prepare`), for all models."""
    encode: Annotated[JsonObject, Changes(Encode)] = {}
    """The latent cache (stage `encode`), for all models."""
    launch: Annotated[JsonObject, Changes(Launch)] = {}
    """On how many processes and machines the stages run, for all models."""
    teacher_cache_gb: Annotated[float, Field(ge=0)] = 0.0
    """Disk for the teacher's predictions of each model, in gigabytes. A later run on the same samples need not compute
    them. 0: no cache."""
    shard_cache_gb: Annotated[float, Field(gt=0)] = 50.0
    """Disk for shards that are read from a bucket (`encode.shards`), in gigabytes."""
    distill: Annotated[JsonObject, Changes(Distill, extended_distill_settings)] = {}
    """Distillation of the adapter (stage `distill`), for all models."""
    evaluation: Annotated[JsonObject, Changes(Evaluation)] = {}
    """What is drawn and measured (stages `reference` and `evaluate`), for all models."""
    gate: Gate = Gate()
    """When a candidate may become champion."""
    registry: Registry = Registry()
    """MLflow: where runs and model versions are kept."""
    publish: Publish = Publish()
    """Where releases are published."""
    flow: Flow = Flow()
    """How the Prefect flows run the stages."""
    notify: Notify = Notify()
    """Whom the flows tell of what has happened, and of what."""
    serving: Serving = Serving()
    """What `lcmlora serve` keeps of the prompts that it draws, and when `watch` says that they have drifted."""
    retention: Retention = Retention()
    """What `lcmlora prune` keeps."""
    costs: Costs = Costs()
    """What devices cost, and how much a model may cost in a month."""
    bases: dict[Name, Base]
    """Base models by name. The published bases sd15, sd21, sdxl and ssd1b need no entry; one under their name changes
    them."""
    style: Annotated[JsonObject, Changes(StyleTraining)] = {}
    """Training of style LoRAs (stage `style`), for all models."""
    styles: dict[Name, Variation] = {}
    """Styles by name, to which acceleration is added."""
    finetune: Annotated[JsonObject, Changes(FinetuneTraining)] = {}
    """Training of whole checkpoints (stage `finetune`), for all models."""
    finetunes: dict[Name, Variation] = {}
    """Fine-tuned checkpoints by name, to which acceleration is added."""
    study: Study | None = None
    """The adapter added to style LoRAs and fine-tuned checkpoints (stage `study`)."""
    compatibility: Compatibility | None = None
    """The adapter together with what people add to the base (stage `compatibility`)."""

    _sources: Path = PrivateAttr(default=Path())  # which relative paths of bases are relative to

    @model_validator(mode="before")
    @classmethod
    def _complete_bases(cls, raw: Any, info: ValidationInfo) -> Any:
        """Adds the published bases, and completes the others from presets and their own files."""
        sources = (info.context or {}).get("sources", Path())
        own = raw.get("bases", {}) if isinstance(raw, dict) else None
        if not isinstance(own, dict):
            return raw
        found = {}
        for name, entry in own.items():
            try:
                found[name] = presets.complete(name, entry, sources).values if isinstance(entry, dict) else entry
            except UserError as error:
                raise ValueError(f"bases.{shown(str(name), 80)}: {error}") from None
        taken = {str(name).lower() for name in own}
        found |= {name: presets.complete(name, {}).values for name in presets.load().bases if name not in taken}
        return raw | {"bases": found}

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for key in ("bases", "styles", "finetunes"):
            if two := names.clashing(getattr(self, key)):
                raise ValueError(f"{key}: {two[0]} and {two[1]} are one folder on a file system that ignores case")
        registered = [model.removeprefix("lcm-lora-") for model in dict.fromkeys(self.models)]
        if twice := [name for name in registered if registered.count(name) > 1]:
            raise ValueError(f"models: {twice[0]} and lcm-lora-{twice[0]} would be registered under one name")
        return self

    @model_validator(mode="after")
    def _models_exist(self) -> Self:
        for model in self.models:
            if model not in self.bases:
                raise ValueError(f"models: no base named {model!r}; bases has {', '.join(self.bases)}")
        for model in self.compatibility.models if self.compatibility else ():
            if model not in self.models:
                raise ValueError(f"compatibility.models: {model!r} is not among models: {', '.join(self.models)}")
        listed = {"gate.approval": () if isinstance(self.gate.approval, str) else self.gate.approval}
        listed |= {f"notify.targets.{name}.models": target.models for name, target in self.notify.targets.items()}
        for key, models in listed.items():
            for model in models:
                if model not in self.models:
                    raise ValueError(f"{key}: {model!r} is not among models: {', '.join(self.models)}")
        for key in ("models", "styles", "finetunes") if self.study else ():
            for name in getattr(self.study, key):
                if name not in getattr(self, key):
                    raise ValueError(f"study.{key}: {name!r} is not among {key}: {', '.join(getattr(self, key))}")
        return self

    @classmethod
    def advice_on_keys(cls, values: Mapping[str, Any]) -> str:
        """Returns the end of the message about an unknown key: files of lcmlora 0.1.0 had a section `pretrain`."""
        return "; `lcmlora upgrade` converts files of lcmlora 0.1.0, which had it" if "pretrain" in values else ""

    def base(self, model: str) -> Base:
        """Returns the base of this name. Raises UserError naming the known ones."""
        if names.check(model, "model") not in self.bases:
            raise UserError(f"unknown model {model!r}; params.yaml has bases {', '.join(self.bases)}")
        return self.bases[model]

    def layers_of(self, section: str, model: str) -> list[Layer]:
        """Returns the layers of a section's settings for a model. A later one overrides those before it."""
        base = self.base(model)
        family = presets.family(base.like)
        found = [Layer(f"preset {family.name}", family.sections.get(section, {}))] if family else []
        values = self.data.model_dump(exclude_unset=True) if section == "data" else getattr(self, section)
        found.append(Layer(section, values))
        if section in _OWN:
            found.append(Layer(f"bases.{model}.{section}", getattr(base, section)))
        return found

    def _settings(self, cls: type[S], found: Sequence[Layer], model: str) -> S:
        base = self.base(model)
        if base.like is None and (lacking := layers.missing_keys(cls, found)):
            section = found[-1].where
            keys = ", ".join(f"{section}.{key}" for key in lacking)
            raise UserError(
                f"bases.{model}: {presets.explain_unknown_family(base.model_dump(), self._sources)}; or write {keys}"
            )
        return layers.combine(cls, found)

    def section(self, section: str, model: str) -> Strict:
        """Returns the settings of any section for a model."""
        found = self.layers_of(section, model)
        return self._settings(_class(section, found), found, model)

    def data_for(self, model: str) -> Data:
        """Returns the pictures that a model learns from."""
        return layers.combine(Data, self.layers_of("data", model)) if self.has_own_data(model) else self.data

    def has_own_data(self, model: str) -> bool:
        """Returns whether a model learns from pictures of its own, and not from those of `data`."""
        return bool(self.base(model).data)

    def models_sharing_data(self) -> list[str]:
        """Returns the models that learn from the pictures of `data`."""
        return [model for model in self.models if not self.has_own_data(model)]

    def uses_shared_data(self) -> bool:
        """Returns whether the pictures of `data` are prepared: not where every model has its own."""
        return bool(self.models_sharing_data()) or not self.models

    def encode_for(self, model: str) -> Encode:
        """Returns the settings of the latent cache of a model."""
        return self._settings(Encode, self.layers_of("encode", model), model)

    def launch_for(self, model: str) -> Launch:
        """Returns how many processes encode and train. Raises UserError if they do not divide the batch."""
        launch = self._settings(Launch, self.layers_of("launch", model), model)
        distill, ranks = self.distill_for(model), launch.processes * launch.machines
        if distill.batch % (ranks * distill.accumulate):
            raise UserError(
                f"{model}: distill.batch {distill.batch} cannot be divided among {ranks} processes (launch) with "
                f"{distill.accumulate} forwards each (distill.accumulate)"
            )
        return launch

    def distill_for(self, model: str) -> Distill:
        """Returns the settings of the distillation, with those that its objective brings.

        Raises:
            UserError: they do not fit, or the objective cannot be imported.
        """
        found = self.layers_of("distill", model)
        return self._settings(_distill_class(found), found, model)

    def evaluation_for(self, model: str) -> Evaluation:
        """Returns the settings of the evaluation of a model."""
        return self._settings(Evaluation, self.layers_of("evaluation", model), model)

    def prompts_digest(self, model: str) -> str | None:
        """Returns the SHA-256 of the model's file of own prompts; None where there is none.

        Raises:
            UserError: the file is missing or cannot be read.
        """
        prompts = self.evaluation_for(model).prompts
        if prompts is None:
            return None
        try:
            return hashlib.sha256(read_bytes(self._sources / prompts)).hexdigest()
        except UserError as error:
            raise UserError(f"evaluation.prompts: {error}") from None

    def digests_of_additions(self) -> dict[str, str]:
        """Returns the SHA-256 of every file and folder that `compatibility` adds, by its key in params.yaml.

        Raises:
            UserError: one is missing.
        """
        found = {}
        for group in ("loras", "controlnets", "ip_adapters") if self.compatibility else ():
            for name, added in getattr(self.compatibility, group).items():
                key, path = f"{group}.{name}", self._sources / added.source
                if not path.exists():
                    raise UserError(f"compatibility.{key}.source: {path}: no such file or folder")
                found[key] = sha256_folder(path) if path.is_dir() else sha256_file(path)
        return found

    def variation(self, model: str, kind: Kind, name: str) -> tuple[Data, Tuning]:
        """Returns the pictures and the training that an entry of `styles` or `finetunes` asks for with this model.

        Raises:
            UserError: there is no such entry.
        """
        cls = StyleTraining if kind == "style" else FinetuneTraining
        own = Layer(f"{kind}s.{name}.training", self._variation(kind, name).training)
        return self.pictures(kind, name), self._settings(cls, [*self.layers_of(kind, model), own], model)

    def _variation(self, kind: Kind, name: str) -> Variation:
        known = self.styles if kind == "style" else self.finetunes
        if names.check(name, kind) not in known:
            raise UserError(f"unknown {kind} {name!r}; params.yaml `{kind}s` has {', '.join(known) or 'none'}")
        return known[name]

    def pictures(self, kind: Kind, name: str) -> Data:
        """Returns the pictures that a style or fine-tune learns from: those of `data` with its own changes."""
        own = Layer(f"{kind}s.{name}.data", self._variation(kind, name).data)
        return layers.combine(Data, [Layer("data", self.data.model_dump()), own])

    def real_pictures(self, kind: Kind, name: str) -> Data:
        """Returns the pictures that a style or fine-tune is measured against: its own, with the study's changes.

        Raises:
            UserError: it has none.
        """
        data = self.pictures(kind, name)
        if not SOURCES.get(data.source).has_pictures:
            raise UserError(
                f"{kind}s.{name}.data.source: {data.source} has no pictures, and a {kind} is learned from some"
            )
        real = Layer("study.real", self.study.real if self.study else {})
        return layers.combine(Data, [Layer(f"{kind}s.{name}.data", data.model_dump()), real])

    def studied(self, model: str) -> list[tuple[Kind, str]]:
        """Returns the styles and fine-tunes with which this model is studied."""
        if self.study is None or model not in self.study.models:
            return []
        return [("style", name) for name in self.study.styles] + [("finetune", name) for name in self.study.finetunes]


def load(path: Path = Path("params.yaml"), sources: Path = Path()) -> Config:
    """Returns the configuration in `path`.

    Args:
        sources: the folder that relative paths of bases are relative to.

    MLFLOW_TRACKING_URI overrides `registry.tracking_uri`: an address with a password does not belong in a file.
    LCMLORA_PUBLISH_TO overrides `publish.to`, so that `lcmlora up` can name the bucket that it serves.

    Raises:
        UserError: the file is missing, is not YAML, or holds a key or value that does not fit.
    """
    raw = read(path)
    for section, key, variable in ENVIRONMENT:
        if (value := os.environ.get(variable)) and isinstance(raw.setdefault(section, {}), dict):
            raw[section][key] = value
    return parse(raw, path, sources)


def parse(raw: JsonObject, path: Path, sources: Path = Path()) -> Config:
    """Returns the configuration that these values are, without regard to environment variables.

    Args:
        raw: as `read` returns it.
        path: the file that errors name.
        sources: the folder that relative paths of bases are relative to.

    Raises:
        UserError: a key or value does not fit.
    """
    try:
        config = Config.model_validate(raw, context={"sources": sources})
        config._sources = sources
    except ValidationError as error:
        faults = layers.explain(error, Config, lambda location: "", advice=Config.advice_on_keys(raw))
    else:
        own = raw.get("bases", {})
        faults = _faults(config, [name for name in config.bases if name in own])
    if faults:
        raise UserError("\n".join(f"{path}: {line}" for line in faults.splitlines()))
    return config


# What environment variables override: section, key, variable.
ENVIRONMENT = (("registry", "tracking_uri", "MLFLOW_TRACKING_URI"), ("publish", "to", "LCMLORA_PUBLISH_TO"))


def read(path: Path) -> JsonObject:
    """Returns what is in the file, with values that can stand in settings. Raises UserError."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; run in the project's folder or name it with --params")
    return values(read_bytes(path, limit=_MAX_BYTES), path)


def values(content: bytes | str, path: Path) -> JsonObject:
    """Returns what is in the content of this file, as `read` does. Raises UserError, which names the file."""
    try:
        raw = parse_yaml(content)
    except Malformed as error:
        reason = str(error)
        raise UserError(f"{path}: {'is ' if reason.startswith('not ') else ''}{reason}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {'nothing' if raw is None else kind_of(raw)}")
    check_plain(raw, str(path))
    return raw


def _distill_class(found: Sequence[Layer]) -> type[Distill]:
    """Returns the class of `distill` for the objective that these layers name. Raises UserError."""
    return distill_settings(layers.merge(found).get("objective", Distill.model_fields["objective"].default))


def _class(section: str, found: Sequence[Layer]) -> type[Strict]:
    """Returns the class of a section's settings, which for `distill` depends on these layers. Raises UserError."""
    if section == "distill":
        return _distill_class(found)
    return Data if section == "data" else SECTIONS[section]


def _section_faults(section: str, found: Sequence[Layer]) -> str:
    """Returns what does not fit in these layers of a section."""
    try:
        return layers.faults(_class(section, found), found)
    except UserError as error:  # of an objective that cannot be imported
        return str(error)


def _faults(config: Config, own: Sequence[str]) -> str:
    """Returns the faults of sections, bases, styles and the study, so that they show now and not hours later.

    Args:
        own: the bases of params.yaml. Those that are not among `models` may lack settings.
    """
    found = [_section_faults(name, [Layer(name, getattr(config, name))]) for name in SECTIONS]
    found += [_section_faults(name, config.layers_of(name, base)) for base in own for name in _OWN]
    for kind in ("style", "finetune"):
        for name, entry in (config.styles if kind == "style" else config.finetunes).items():
            training = Layer(f"{kind}s.{name}.training", entry.training)
            found.append(layers.faults(SECTIONS[kind], [Layer(kind, getattr(config, kind)), training]))
    if config.study:
        found.append(layers.faults(Data, [Layer("study.real", config.study.real)]))
    if not any(found):
        try:
            _check_models(config)
        except UserError as error:
            found = [str(error)]
    return "\n".join(dict.fromkeys(line for text in found for line in text.splitlines()))


def _check_models(config: Config) -> None:
    """Raises UserError if settings of a model, a style or the study contradict each other."""
    for model in config.models:
        config.launch_for(model)
        evaluation = config.evaluation_for(model)
        _check_features(model, config.base(model).resolution, evaluation)
        for name in config.gate.limits:
            if name not in evaluation.scores:
                listed = ", ".join(evaluation.scores) or "none"
                raise UserError(f"{model}: gate.limits: {name} is not among evaluation.scores, which has {listed}")
        encoding, batch = config.encode_for(model), config.distill_for(model).batch
        if encoding.aspect_buckets and encoding.bucket_pictures < 2 * batch:
            raise UserError(
                f"{model}: encode.bucket_pictures: {encoding.bucket_pictures} is less than two batches (distill.batch "
                f"{batch}); pictures of a shape that do not fill a batch are never seen"
            )
        if (distill := config.distill_for(model)).trajectory:
            has_pictures = SOURCES.get(config.data_for(model).source).has_pictures
            check_trajectory(distill, None if has_pictures else encoding.rollouts, f"{model}: ")
    for kind in ("style", "finetune"):
        for name in config.styles if kind == "style" else config.finetunes:
            config.pictures(kind, name)
    for model in config.study.models if config.study else ():
        for kind, name in config.studied(model):
            config.real_pictures(kind, name), config.variation(model, kind, name)


def _check_features(model: str, resolution: int, settings: Evaluation) -> None:
    """Raises UserError where the image features cannot see what a few-step adapter does wrong at this resolution."""
    if settings.features == _SMALL_FEATURES and resolution > _SMALL_PICTURES:
        raise UserError(
            f"{model}: evaluation.features: {_SMALL_FEATURES} sees pictures at 128 pixels, where blur at {resolution} "
            "is lost. Set clip or inception, which are downloaded (without a hub, evaluation.features_source names "
            "their folder or file), or efficientnet-lite0-crops, which needs no download and more than 640 pictures"
        )


def digest(*settings: BaseModel | JsonObject | str) -> str:
    """Returns a SHA-256 over settings, equal for equal settings whatever their order of keys."""
    plain = [s.model_dump(mode="json") if isinstance(s, BaseModel) else s for s in settings]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
