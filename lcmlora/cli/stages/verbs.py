"""The verbs that are stages of dvc.yaml: they turn files into files. Heavy imports happen inside the verbs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lcmlora.cli.context import Context, context_of
from lcmlora.cli.stages import loading
from lcmlora.cli.stages.command import Checkpoint, Model, OwnData, Style, StyleOrCheckpoint
from lcmlora.cli.stages.loading import LoadBase, drawing_base
from lcmlora.errors import UserError
from lcmlora.io.files import discard, locked
from lcmlora.io.terminal import note
from lcmlora.plugins import SOURCES

if TYPE_CHECKING:
    from lcmlora.config import Config, Distill, Kind
    from lcmlora.parallel.ranks import Ranks
    from lcmlora.project import Project
    from lcmlora.registry.tracking import Run


def pretrain_stage(call: typer.Context) -> None:
    """Train the embedded emoji base from scratch. You need not run this: its weights are in Git.

    It takes hours on two cores, and the stage is frozen in dvc.yaml.

    Example: dvc unfreeze pretrain && dvc repro pretrain && dvc freeze pretrain
    """
    project = context_of(call).project
    from lcmlora import bases, stages
    from lcmlora.config import digest
    from lcmlora.demo.pretrain import pretrain_base
    from lcmlora.settings.pretrain import Recipe

    recipe = Recipe()
    key = digest(recipe, stages.algorithms("pretrain"))[:12]
    with locked(project.scratch("pretrain", key)) as scratch:
        pretrain_base(recipe, project.npm_packages, scratch, project.base("emoji"), bases.pick_device("auto"))


def prepare_stage(call: typer.Context, model: OwnData = None) -> None:
    """Read the captioned pictures, drop unusable ones, and split them by caption into train, validation and test.

    The output has the list of pictures, and a report of the dropped ones with the reasons.

    Examples:

      lcmlora prepare                      the pictures of `data`, which models share

      lcmlora prepare sdxl                 the pictures of a base with `data` of its own
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora.config import Launch
    from lcmlora.data import enlargement
    from lcmlora.data.prepare import prepare_pictures, print_report

    if model is not None and not config.has_own_data(model):
        raise UserError(f"bases.{model}.data: is missing; {model} learns from the pictures of `data`: lcmlora prepare")
    models = config.models_sharing_data() if model is None else [model]
    data = project.located_data(config.data if model is None else config.data_for(model))
    pictures = project.pictures if model is None else project.own_pictures(model)
    minimum = max((config.distill_for(name).batch for name in models), default=1)
    launch = Launch.model_validate(config.launch) if model is None else config.launch_for(model)
    scratch = project.scratch("prepare") if model is None else project.scratch("prepare-own", model)
    print_report(prepare_pictures(data, minimum, pictures, scratch=scratch, launch=launch))
    for name in models:
        enlargement.warn(data, name, config.base(name).resolution, pictures)


def encode_stage(call: typer.Context, model: Model) -> None:
    """Encode the training pictures and captions into the latent cache of a base.

    Distillation reads only this cache. A run that was killed goes on from its last shard.

    Example: lcmlora encode emoji
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    settings, launch = config.encode_for(model), config.launch_for(model)
    from lcmlora.data import enlargement
    from lcmlora.data.latents.encode import encode_latents
    from lcmlora.diffusion import objectives

    loading.refuse_ranks("encode")
    objectives.check(config.distill_for(model), f"{model}: ")  # before the encoding, which may take hours
    data = project.located_data(config.data_for(model))
    parts = ("vae" if SOURCES.get(data.source).has_pictures else "network", "text")
    load = LoadBase(model, config.base(model), project.base(model), settings.device, parts)
    base, pictures = load(), project.pictures_of(model, config)
    enlargement.warn(data, model, base.resolution, pictures)
    encode_latents(base, data, settings, pictures, project.scratch("encode"), project.latents(model), launch, load)


def reference_stage(call: typer.Context, model: Model) -> None:
    """Draw the pictures with which `evaluate` compares an adapter: the teacher's and the solvers'.

    No adapter changes them, so they are drawn once, and their features are kept.

    Example: lcmlora reference emoji
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora.evaluation.reference import draw_reference
    from lcmlora.evaluation.sets.drawing import drawers

    loading.refuse_ranks("reference")
    load, settings = drawing_base(project, config, model)
    base = load()
    with (
        locked(project.scratch("reference", model)) as scratch,
        drawers(config.launch_for(model), load, base, settings) as many,
    ):
        draw_reference(
            base,
            project.located_data(config.data_for(model)),
            settings,
            project.pictures_of(model, config),
            scratch,
            project.reference(model),
            project.timings(model),
            many,
        )


def distill_stage(call: typer.Context, model: Model) -> None:
    """Distil the base into an adapter. A run that was killed goes on from its last checkpoint.

    The adapter is written to adapters/MODEL, and the losses to MLflow at registry.tracking_uri. With distill.polish it
    is written to distilled/MODEL, and `lcmlora polish` makes adapters/MODEL of it.

    Example: lcmlora distill emoji
    """
    context = context_of(call)
    config = context.settings()
    settings, launch = config.distill_for(model).alone(), config.launch_for(model)
    with loading.ranks_of(launch, settings.device) as ranks:
        _distill(context.project, config, model, settings, ranks)


def _distill(project: Project, config: Config, model: str, settings: Distill, ranks: Ranks) -> None:
    from lcmlora import stages
    from lcmlora.bases import folders
    from lcmlora.config import digest
    from lcmlora.distillation.distill import distill_adapter

    loaded, cache = loading.base_and_cache(project, config, model, settings, pictures=ranks.first)
    identity = folders.identity(config.base(model), project.base(model))
    key = digest(settings, identity, cache.digest, stages.algorithms("distill"))[:12]
    scratch, limit = project.scratch("distill", f"{model}-{key}"), int(config.teacher_cache_gb * 1e9)
    out = project.distilled(model, config)
    with _training(project, config, model, settings, scratch, out, ranks) as run:
        distill_adapter(
            loaded,
            cache,
            settings,
            scratch,
            out,
            identity=identity,
            logger=run,
            ranks=ranks,
            decode=loaded.decode if ranks.first else None,
            teacher_cache=(project.scratch("teacher"), limit) if limit else None,
        )


@contextlib.contextmanager
def _training(
    project: Project, config: Config, model: str, settings: Distill, scratch: Path, out: Path, ranks: Ranks
) -> Iterator[Run]:
    """Yields the run in MLflow of a training that makes an adapter in the folder `out`.

    Within the block, `scratch` is of this training alone. It goes when the adapter is made. Of several processes, the
    first one locks, logs and cleans up.
    """
    from lcmlora.adapters import lora
    from lcmlora.distillation.outcome import versions
    from lcmlora.dvc_files import stage_records
    from lcmlora.io.files import sha256_file
    from lcmlora.registry import tracking

    logged, ran_with = (config.registry, stage_records.summary(project)) if ranks.first else (None, {})
    with (
        locked(scratch) if ranks.first else contextlib.nullcontext(),
        tracking.log_run(logged, model, settings.model_dump(mode="json"), scratch) as run,
    ):
        yield run
        if ranks.first:
            run.tag_adapter(sha256_file(out / lora.WEIGHTS), versions() | ran_with)
    if ranks.first:
        discard(scratch)


def polish_stage(call: typer.Context, model: Model) -> None:
    """Train a distilled adapter on by distribution matching, where params.yaml has distill.polish.

    It is distilled to distilled/MODEL and polished to adapters/MODEL. A run that was killed goes on from its last
    checkpoint.

    Example: lcmlora polish emoji
    """
    context = context_of(call)
    config = context.settings()
    settings, launch = config.distill_for(model), config.launch_for(model)
    if settings.polish is None:
        raise UserError(f"{model}: distill.polish: is missing in params.yaml, which says how adapters are polished")
    with loading.ranks_of(launch, settings.device) as ranks:
        _polish(context.project, config, model, settings, ranks)


def _polish(project: Project, config: Config, model: str, settings: Distill, ranks: Ranks) -> None:
    from lcmlora import stages
    from lcmlora.adapters import lora
    from lcmlora.bases import folders
    from lcmlora.config import digest
    from lcmlora.distillation.polish import polish_adapter
    from lcmlora.evaluation.comparisons.judging import TeacherJudge
    from lcmlora.io.files import sha256_file

    assert settings.polish is not None
    distilled, out = project.distilled(model, config), project.adapter(model)
    if not (distilled / lora.WEIGHTS).is_file():
        raise UserError(f"{distilled}: holds no distilled adapter; run `lcmlora distill {model}` first")
    base, cache = loading.base_and_cache(project, config, model, settings, pictures=ranks.first, texts=ranks.first)
    identity = folders.identity(config.base(model), project.base(model))
    evaluation = project.located_evaluation(config.evaluation_for(model))
    key = digest(
        *(settings, identity, cache.digest, stages.algorithms("polish"), sha256_file(distilled / lora.WEIGHTS)),
        stages.decisive_settings(config, stages.Run("polish", model)),
    )
    scratch = project.scratch("polish", f"{model}-{key[:12]}")
    with _training(project, config, model, settings, scratch, out, ranks) as run:
        judge = None
        if ranks.first:
            steps, pictures = settings.polish.student_steps, project.pictures_of(model, config)
            judge = TeacherJudge.of(base, evaluation, pictures, steps, scratch)
        polish_adapter(
            base, cache, settings, distilled, scratch, out, identity=identity, logger=run, judge=judge, ranks=ranks
        )


def evaluate_stage(call: typer.Context, model: Model) -> None:
    """Draw with the adapter in few steps, and compare the pictures with the teacher's and the solvers'.

    The figures are written to metrics/MODEL.json; the gate decides by them.

    Example: lcmlora evaluate emoji
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora.evaluation.evaluate import evaluate_student
    from lcmlora.evaluation.sets.drawing import drawers

    loading.refuse_ranks("evaluate")
    load, settings = drawing_base(project, config, model)
    base = load()
    with (
        locked(project.scratch("evaluate", model)) as scratch,
        drawers(config.launch_for(model), load, base, settings, project.adapter(model)) as many,
    ):
        evaluate_student(
            base,
            project.adapter(model),
            project.located_data(config.data_for(model)),
            settings,
            project.pictures_of(model, config),
            project.reference(model),
            scratch,
            project.evaluation(model),
            project.metrics(model),
            project.plot(model),
            project.timings(model),
            config.gate.steps,
            many,
        )


def style_stage(call: typer.Context, model: Model, name: Style) -> None:
    """Train a style LoRA by the ordinary diffusion loss. `study` tests the adapter together with it.

    Example: lcmlora style emoji noto-v1
    """
    context = context_of(call)
    _tune(context, "style", model, name, context.project.style(model, name))


def finetune_stage(call: typer.Context, model: Model, name: Checkpoint) -> None:
    """Fine-tune all weights of a base on other pictures. `study` tests the adapter on the result.

    Example: lcmlora finetune emoji noto-v1-full
    """
    context = context_of(call)
    _tune(context, "finetune", model, name, context.project.finetune(model, name))


def _tune(context: Context, kind: Kind, model: str, name: str, out: Path) -> None:
    config, project = context.settings(), context.project
    config.real_pictures(kind, name)
    data, settings = config.variation(model, kind, name)
    from lcmlora import bases, stages
    from lcmlora.bases import folders
    from lcmlora.config import digest
    from lcmlora.data.latents.cache import MANIFEST, LatentCache
    from lcmlora.data.latents.encode import encode_latents
    from lcmlora.data.prepare import prepare_pictures, print_report
    from lcmlora.distillation.finetune import train_variation
    from lcmlora.registry import tracking

    entry, folder = config.base(model), project.base(model)
    device = bases.pick_device(settings.device)
    dtype = bases.pick_dtype(settings.precision, device)
    identity = folders.identity(entry, folder)
    key = digest(data, settings, identity, stages.algorithms(kind))[:12]
    work = project.scratch(kind, f"{model}-{name}-{key}")
    data = project.located_data(data)
    with locked(work):
        print_report(prepare_pictures(data, settings.batch, work / "pictures"))
        base = bases.load(model, entry, folder, device=device, dtype=dtype, parts=("vae", "text"))
        if not (work / "latents" / MANIFEST).exists():
            encoding = config.encode_for(model).model_copy(update={"shards": None})
            encode_latents(base, data, encoding, work / "pictures", work / "encode", work / "latents")
        del base
        cache = LatentCache(work / "latents")
        parts = ("network", "text") if cache.tokenized else ("network",)
        bare = bases.load(model, entry, folder, device=device, dtype=dtype, parts=parts)
        cache.embed = bare.encode_tokens
        with tracking.log_run(config.registry, f"{model}-{kind}-{name}", settings.model_dump(mode="json"), work) as run:
            train_variation(bare, cache, settings, work, out, identity=identity, logger=run)
    discard(work)


def alone_stage(call: typer.Context, model: Model, name: StyleOrCheckpoint) -> None:
    """Draw with a style or a fine-tuned checkpoint without the adapter, by guided solvers. `study` compares with it.

    Example: lcmlora alone emoji noto-v1
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora import stages
    from lcmlora.evaluation.study import draw_alone

    kind = stages.studied_kind(config, model, name)
    assert config.study is not None
    folder = _variation(project, kind, model, name)
    load, settings = drawing_base(project, config, model, folder if kind == "finetune" else None)
    base = load()
    with locked(project.scratch("alone", f"{model}-{name}")) as scratch:
        draw_alone(
            base,
            kind,
            folder,
            project.located_data(config.real_pictures(kind, name)),
            config.study,
            settings,
            scratch,
            project.alone(model, name),
        )


def study_stage(call: typer.Context, model: Model) -> None:
    """Test the adapter on every style and fine-tuned checkpoint of `study`, which it was not distilled from.

    Example: lcmlora study emoji
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    if config.study is None or not config.studied(model):
        raise UserError(f"{model}: is not studied; add it to study.models in params.yaml, with styles or finetunes")
    from lcmlora.evaluation.study import Variation, run_study

    variations = [
        Variation(kind, name, _variation(project, kind, model, name), project.alone(model, name))
        for kind, name in config.studied(model)
    ]
    with locked(project.scratch("study", model)) as scratch:
        run_study(
            lambda folder: drawing_base(project, config, model, folder)[0](),
            project.adapter(model),
            variations,
            config.study,
            project.located_evaluation(config.evaluation_for(model)),
            project.reference(model),
            scratch,
            project.study(model),
        )


def compatibility_stage(call: typer.Context, model: Model) -> None:
    """Try the adapter together with what people add to the base: style LoRAs, img2img, ControlNets, int8 and others.

    Each is compared with the teacher with the same addition. `compatibility` in params.yaml says which are tried. A
    run that was killed goes on where it was.

    Example: lcmlora compatibility emoji
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    if config.compatibility is None:
        raise UserError("params.yaml: compatibility: is missing, which says what is tried (docs/compatibility.md)")
    from lcmlora.inference.compatibility import Inputs, try_additions

    inputs = Inputs(
        model=model,
        base=config.base(model),
        base_folder=project.base(model),
        adapter=project.adapter(model),
        data=project.located_data(config.data_for(model)),
        pictures=project.pictures_of(model, config),
        evaluation=project.located_evaluation(config.evaluation_for(model)),
        settings=config.compatibility,
        root=project.root,
    )
    with locked(project.scratch("compatibility", model)) as scratch:
        found = try_additions(inputs, scratch, project.compatibility(model))
    for name, key, reason in found.failures:
        note(f"{key}: {name}: {reason}")
    for name, reason in found.left_out.items():
        note(f"{name}: was not tried: {reason}")


def package_stage(call: typer.Context, model: Model) -> None:
    """Make the release bundle in release/MODEL, and check that plain diffusers draws the same with it.

    The bundle has the weights in two formats, the card, the report and the provenance.

    Example: lcmlora package emoji
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora.releases.package import package_release

    package_release(model, config, project, project.base(model))


VERBS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain_stage,
    "prepare": prepare_stage,
    "encode": encode_stage,
    "reference": reference_stage,
    "distill": distill_stage,
    "polish": polish_stage,
    "evaluate": evaluate_stage,
    "style": style_stage,
    "finetune": finetune_stage,
    "alone": alone_stage,
    "study": study_stage,
    "compatibility": compatibility_stage,
    "package": package_stage,
}


def _variation(project: Project, kind: Kind, model: str, name: str) -> Path:
    return project.style(model, name) if kind == "style" else project.finetune(model, name)
