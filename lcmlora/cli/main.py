"""`lcmlora <verb>`: what dvc.yaml calls, and what a person runs by hand. Heavy imports happen inside the verbs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lcmlora.cli import data, registry, releases, settings, stages
from lcmlora.cli.adapters import verbs
from lcmlora.cli.context import Context, context_of
from lcmlora.cli.reporting import reporting
from lcmlora.cli.stages import Model, StageCommand, base_and_cache
from lcmlora.io import faults
from lcmlora.io.terminal import note, say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Distil latent diffusion models into LCM-LoRA adapters, evaluate and release them.

    A verb reads params.yaml and works in its folder: the current one, or that of --project or --params. Most verbs are
    stages of dvc.yaml. `dvc repro` runs what is stale; `python -m flows.retrain` also registers and publishes.

    Examples:

      lcmlora prepare                      read and filter the captioned pictures

      lcmlora distill emoji                train (or continue) the adapter of model `emoji`

      lcmlora --project ~/owls check       read the params.yaml of that folder and say whether it is sound
    """,
)


@app.callback()
def _options(
    call: typer.Context,
    params: Annotated[
        Path | None, typer.Option(help="The configuration file; params.yaml by default.", show_default=False)
    ] = None,
    project: Annotated[
        Path | None,
        typer.Option(help="The project's folder; by default that of --params, or the current one.", show_default=False),
    ] = None,
) -> None:
    call.obj = Context.of(params, project)


@app.command()
def check(call: typer.Context) -> None:
    """Read params.yaml and print the models and settings it resolves to.

    Example: lcmlora check
    """
    config = context_of(call).settings()
    for model in config.models:
        base = config.base(model)
        own = f", pictures of its own at {config.data_for(model).path}" if config.has_own_data(model) else ""
        steps = config.distill_for(model).steps
        say(f"{model}: {base.source} at {base.resolution} px, {steps} steps of distillation{own}")


app.command("config")(settings.print_settings)


@app.command("bases")
def list_bases(
    call: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object for each base.")] = False,
) -> None:
    """List the bases of params.yaml, with the parameters of each UNet and of its adapter; nothing is downloaded.

    Example: lcmlora bases
    """
    context = context_of(call)
    config = context.settings()
    from lcmlora.bases import description

    described = description.describe_all(config, context.project)
    if as_json:
        print(json.dumps([asdict(base) for base in described], indent=2))
    else:
        description.print_table(described)


@app.command()
def resolve(call: typer.Context) -> None:
    """Write resolved.yaml: all settings and versions that decide a stage's result, which DVC reads as parameters.

    `dvc repro` and the flow do this first. A change of params.yaml, of a default or of an algorithm's version makes
    those stages stale that it decides. Where models have begun or ceased to learn from pictures of their own (`data`
    of a base), the stages of dvc.yaml that read pictures are written anew, too.

    Example: lcmlora resolve
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora.dvc_files import dvc_yaml, resolved

    if "DVC_STAGE" in os.environ:  # DVC has read dvc.yaml and would go on as that was
        dvc_yaml.check(config, project)
    elif dvc_yaml.refresh(config, project):
        note(f"{project.dvc_yaml}: lists the pictures of each model anew")
    changed = resolved.refresh(config, project.resolved)
    note(f"{project.resolved}: {'is up to date now' if changed else 'was up to date'}")


@app.command()
def fetch(call: typer.Context, model: Model) -> None:
    """Put a base at bases/MODEL: download a hub id at its revision, link a local folder, convert a single file.

    Every part is examined, once: files, shapes, finite numbers, tokenizers. Its precision and digest are told.

    Example: lcmlora fetch sd15
    """
    context = context_of(call)
    base, project = context.settings().base(model), context.project
    from lcmlora.bases import fetching
    from lcmlora.bases.examination.examine import examine_base

    folder = fetching.fetch(model, base, project.bases, project.root)
    say(folder)
    note(f"{model}: {examine_base(model, folder, base.variant)}")


for _name, _stage in stages.VERBS.items():
    app.command(_name, cls=StageCommand)(_stage)


@app.command()
def doctor(
    call: typer.Context,
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say what distilling will take: data, memory, speed, hours, disk. Takes some real steps and one validation.

    Example: lcmlora doctor sdxl
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora.distillation.doctor import estimate_run, print_estimate

    settings, launch = config.distill_for(model), config.launch_for(model)
    base, cache = base_and_cache(project, config, model, settings, pictures=True)
    scratch = project.scratch("distill")
    scratch.mkdir(parents=True, exist_ok=True)
    estimate = estimate_run(base, cache, settings, launch, scratch)
    if as_json:
        print(estimate.to_json())
    else:
        print_estimate(estimate, settings, model)


for _verb in (verbs.convert, verbs.combine, verbs.generate, verbs.remeasure):
    app.command()(_verb)
app.add_typer(data.app, name="data")
app.add_typer(registry.app, name="registry")
app.add_typer(releases.app, name="releases")


def main() -> None:
    """Runs the command line; a UserError is printed as it is and ends with status 2."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # read when they are imported; whoever sets them otherwise is right
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for entry in importlib.metadata.entry_points(group="lcmlora.verbs"):
        app.command(entry.name)(entry.load())
    rank = os.environ.get("RANK", "0")
    with reporting("" if rank == "0" else f"process {rank}: ", faults.verb_of(sys.argv[1:])):
        app()


if __name__ == "__main__":
    main()
