"""`lcmlora <verb>`: what dvc.yaml calls, and what a person runs by hand. Heavy imports happen inside the verbs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lcmlora import names
from lcmlora.cli import adapters, data, registry, releases, studies
from lcmlora.cli.reporting import reporting
from lcmlora.io import faults
from lcmlora.io.terminal import note, say
from lcmlora.plugins import SOURCES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Distil latent diffusion models into LCM-LoRA adapters, evaluate and release them.

    Each verb is one stage of dvc.yaml and reads params.yaml in the current folder. `dvc repro` runs what is stale;
    `python -m flows.retrain` also registers and publishes.

    Examples:

      lcmlora prepare                      read and filter the captioned pictures

      lcmlora distill emoji                train (or continue) the adapter of model `emoji`

      lcmlora --params my.yaml check       read a configuration and say whether it is sound
    """,
)

PARAMS = Path("params.yaml")

Model = Annotated[str, typer.Argument(help="A name under `bases` in params.yaml, e.g. emoji.", show_default=False)]


class _Stage(TyperCommand):
    """A verb that dvc.yaml calls: its names may be given as DVC writes them, --model NAME and --name NAME."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, names.arguments(args))

    def invoke(self, ctx: Any) -> Any:
        if ctx.obj != PARAMS:  # the settings are not those that DVC and resolved.yaml know
            return super().invoke(ctx)
        from lcmlora import resolved
        from lcmlora.stages import Run

        with resolved.running(_configure(ctx), Run(str(self.name), ctx.params.get("model"), ctx.params.get("name"))):
            return super().invoke(ctx)


@app.callback()
def _options(
    context: typer.Context,
    params: Annotated[Path, typer.Option(help="The configuration file.")] = PARAMS,
) -> None:
    context.obj = params


def _configure(context: typer.Context):  # type: ignore[no-untyped-def]  # the type would import pydantic for --help
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from lcmlora import config

    return config.load(context.obj)


def _scratch(*names: str) -> Path:
    return Path("scratch", *names)


@app.command()
def check(context: typer.Context) -> None:
    """Read params.yaml and print the models and settings it resolves to.

    Example: lcmlora check
    """
    config = _configure(context)
    for model in config.models:
        base = config.base(model)
        say(f"{model}: {base.source} at {base.resolution} px, {config.distill_for(model).steps} steps of distillation")


@app.command("bases")
def list_bases(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object for each base.")] = False,
) -> None:
    """List the bases of params.yaml, with the parameters of each UNet and of its adapter; nothing is downloaded.

    Example: lcmlora bases
    """
    config = _configure(context)
    from lcmlora.bases import description

    rows = description.rows(config)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        description.print_table(rows)


@app.command()
def resolve(context: typer.Context) -> None:
    """Write resolved.yaml: all settings and versions that decide a stage's result, which DVC reads as parameters.

    `dvc repro` and the flow do this first. A change of params.yaml, of a default or of an algorithm's version makes
    those stages stale that it decides.

    Example: lcmlora resolve
    """
    config = _configure(context)
    from lcmlora import resolved

    changed = resolved.refresh(config)
    note(f"{resolved.FILE}: {'is up to date now' if changed else 'was up to date'}")


@app.command(cls=_Stage)
def pretrain(context: typer.Context) -> None:
    """Train the embedded emoji base from nothing (hours on two cores; its weights are in Git already).

    Example: dvc unfreeze pretrain && dvc repro pretrain && dvc freeze pretrain
    """
    config = _configure(context)
    from lcmlora import bases
    from lcmlora.config import digest
    from lcmlora.demo.pretrain import pretrain as train
    from lcmlora.training import checkpoint

    with checkpoint.locked(_scratch("pretrain", digest(config.pretrain)[:12])) as scratch:
        train(config.pretrain, Path("node_modules"), scratch, Path("bases/emoji"), bases.pick_device("auto"))


@app.command()
def fetch(context: typer.Context, model: Model) -> None:
    """Put a base at bases/MODEL: download a hub id at its revision, link a local folder, convert a single file.

    Every part is examined, once: files, shapes, finite numbers, tokenizers. Its precision and digest are told.

    Example: lcmlora fetch sd15
    """
    config = _configure(context)
    from lcmlora.bases import fetching
    from lcmlora.bases.examination import examine

    base = config.base(model)
    folder = fetching.fetch(model, base)
    say(folder)
    note(f"{model}: {examine.examine(model, folder, base.variant)}")


@app.command(cls=_Stage)
def prepare(context: typer.Context) -> None:
    """Read the captioned pictures, drop what cannot be used, and split by caption into training and validation.

    Example: lcmlora prepare
    """
    config = _configure(context)
    from lcmlora.data import enlargement
    from lcmlora.data import prepare as stage

    minimum = max((config.distill_for(model).batch for model in config.models), default=config.distill.batch)
    stage.print_report(stage.prepare(config.data, minimum, Path("data/pictures")))
    for model in config.models:
        enlargement.warn(config.data, model, config.base(model).resolution, Path("data/pictures"))


@app.command(cls=_Stage)
def encode(context: typer.Context, model: Model) -> None:
    """Encode the training pictures and captions into the latent cache of one base; a killed run goes on.

    Example: lcmlora encode emoji
    """
    config = _configure(context)
    settings, launch = config.encode_for(model), config.launch_for(model)
    from lcmlora.parallel import launcher, ranks

    if launch.processes * launch.machines > 1 and not ranks.launched():
        raise SystemExit(launcher.launch(launch, "lcmlora", sys.argv[1:]))
    with ranks.connected(settings.device) as place:
        _encode(config, model, settings, place)


def _encode(config, model: str, settings, place) -> None:  # type: ignore[no-untyped-def]
    from lcmlora.data import enlargement
    from lcmlora.data.latents.encode import encode as fill

    encoder = "vae" if SOURCES.get(config.data.source).has_pictures else "unet"
    base = _load(config, model, settings.device, encoder, "text")
    out = Path("data/latents", model)
    if place.first:
        enlargement.warn(config.data, model, base.resolution, Path("data/pictures"))
    fill(base, config.data, settings, Path("data/pictures"), _scratch("encode"), out, place)


@app.command(cls=_Stage)
def reference(context: typer.Context, model: Model) -> None:
    """Draw what no adapter changes: the teacher's pictures and the solvers', with their features.

    Example: lcmlora reference emoji
    """
    config = _configure(context)
    from lcmlora.evaluation import reference as stage
    from lcmlora.training import checkpoint

    base, settings = _drawing_base(config, model)
    with checkpoint.locked(_scratch("reference", model)) as scratch:
        stage.draw_reference(
            base,
            config.data,
            settings,
            Path("data/pictures"),
            scratch,
            Path("reference", model),
            Path("timings", model),
        )


@app.command(cls=_Stage)
def distill(context: typer.Context, model: Model) -> None:
    """Distil the base into an adapter; a run that was killed continues from its last checkpoint.

    Example: lcmlora distill emoji
    """
    config = _configure(context)
    settings, launch = config.distill_for(model), config.launch_for(model)
    from lcmlora.parallel import launcher, ranks

    if launch.processes * launch.machines > 1 and not ranks.launched():
        raise SystemExit(launcher.launch(launch, "lcmlora", sys.argv[1:]))
    with ranks.connected(settings.device) as place:
        _distill(config, model, settings, place)


def _load(config, model: str, device: str, *parts: str, precision: str = "auto"):  # type: ignore[no-untyped-def]
    from lcmlora import bases

    place = bases.pick_device(device)
    dtype = bases.pick_dtype(precision, place)
    return bases.load(model, config.base(model), Path("bases", model), device=place, dtype=dtype, parts=parts)


def _with_cache(config, model: str, settings, *, pictures: bool):  # type: ignore[no-untyped-def]
    """Returns the base, with a VAE where pictures are wanted, and its latent cache."""
    from lcmlora import bases
    from lcmlora.data.latents.cache import LatentCache

    bases.pick_device(settings.device)  # without a device the cache does not matter
    budget = int(config.shard_cache_gb * 1e9)
    cache = LatentCache(Path("data/latents", model), shards=_scratch("shards", model), budget=budget)
    also = (["vae"] if pictures else []) + (["text"] if cache.tokenized else [])
    base = _load(config, model, settings.device, "unet", *also, precision=settings.precision)
    cache.embed = base.encode_tokens
    return base, cache


def _distill(config, model: str, settings, place) -> None:  # type: ignore[no-untyped-def]
    from lcmlora.adapters import lora
    from lcmlora.bases import folders
    from lcmlora.config import digest
    from lcmlora.distillation.distill import distill as train
    from lcmlora.distillation.distill import versions
    from lcmlora.io.files import sha256_file
    from lcmlora.registry import tracking
    from lcmlora.training import checkpoint

    folder = Path("bases", model)
    loaded, cache = _with_cache(config, model, settings, pictures=place.first)
    identity = folders.identity(config.base(model), folder)
    key = digest(settings, identity, cache.digest)[:12]
    scratch = _scratch("distill", f"{model}-{key}")
    logged = config.registry if place.first else None
    with (
        checkpoint.locked(scratch) if place.first else contextlib.nullcontext(),
        tracking.tracking(logged, model, settings.model_dump(mode="json"), scratch) as run,
    ):
        train(
            loaded,
            cache,
            settings,
            scratch,
            Path("adapters", model),
            identity=identity,
            logger=run,
            ranks=place,
            decode=loaded.decode if place.first else None,
            teacher_cache=(_scratch("teacher"), int(config.teacher_cache_gb * 1e9))
            if config.teacher_cache_gb
            else None,
        )
        if place.first:
            run.made(sha256_file(Path("adapters", model, lora.WEIGHTS)), versions())
    if place.first:
        checkpoint.discard(scratch)


@app.command()
def doctor(
    context: typer.Context,
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say what distilling will take: data, memory, speed, hours, disk. Takes some real steps and one validation.

    Example: lcmlora doctor sdxl
    """
    config = _configure(context)
    import json

    from lcmlora.distillation import doctor

    settings, launch = config.distill_for(model), config.launch_for(model)
    base, cache = _with_cache(config, model, settings, pictures=True)
    scratch = _scratch("distill")
    scratch.mkdir(parents=True, exist_ok=True)
    examination = doctor.examine(base, cache, settings, launch, scratch)
    if as_json:
        print(json.dumps(examination.plain(), indent=2))
    else:
        doctor.show(examination, settings, model)


@app.command(cls=_Stage)
def evaluate(context: typer.Context, model: Model) -> None:
    """Draw with the adapter in few steps and compare with the teacher and the solvers.

    Example: lcmlora evaluate emoji
    """
    config = _configure(context)
    from lcmlora.evaluation import evaluate as stage
    from lcmlora.training import checkpoint

    base, settings = _drawing_base(config, model)
    with checkpoint.locked(_scratch("evaluate", model)) as scratch:
        stage.evaluate(
            base,
            Path("adapters", model),
            config.data,
            settings,
            Path("data/pictures"),
            Path("reference", model),
            scratch,
            Path("evaluation", model),
            Path("metrics", f"{model}.json"),
            Path("plots", f"{model}_steps.csv"),
            Path("timings", model),
        )


def _drawing_base(config, model: str):  # type: ignore[no-untyped-def]
    settings = config.evaluation_for(model)
    return _load(config, model, settings.device, "unet", "vae", "text"), settings


@app.command(cls=_Stage)
def package(context: typer.Context, model: Model) -> None:
    """Make the release bundle and prove that plain diffusers loads it with the same result.

    Example: lcmlora package emoji
    """
    config = _configure(context)
    from lcmlora.releases import package as release

    release.package(
        model,
        config,
        Path("adapters", model),
        Path("bases", model),
        Path("metrics", f"{model}.json"),
        Path("evaluation", model),
        Path("timings", model),
        Path("study", model),
        Path("release", model),
    )


for _verb in (studies.style, studies.finetune, studies.alone, studies.study):
    app.command(cls=_Stage)(_verb)
for _tool in (
    adapters.convert,
    adapters.combine,
    adapters.generate,
    adapters.remeasure,
):
    app.command()(_tool)
app.add_typer(data.app, name="data")
app.add_typer(registry.app, name="registry")
app.add_typer(releases.app, name="releases")


def main() -> None:
    """Runs the command line; a UserError is printed as it is and ends with status 2."""
    for entry in importlib.metadata.entry_points(group="lcmlora.verbs"):
        app.command(entry.name)(entry.load())
    rank = os.environ.get("RANK", "0")
    with reporting("" if rank == "0" else f"process {rank}: ", faults.verb_of(sys.argv[1:])):
        app()


if __name__ == "__main__":
    main()
