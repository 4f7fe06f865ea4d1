"""The command line `lcmlora VERB`, for dvc.yaml and for people. Heavy imports happen inside the verbs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lcmlora import __version__
from lcmlora.cli import data, doctor, projects, registry, releases, settings
from lcmlora.cli.adapters import presenting, prompts, verbs
from lcmlora.cli.context import Context, context_of
from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.cli.shell.verbs import Verbs
from lcmlora.cli.stages.command import Model, StageCommand
from lcmlora.cli.stages.verbs import VERBS
from lcmlora.io import faults
from lcmlora.io.terminal import note, say

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Distil latent diffusion models into LCM-LoRA adapters that draw in 1 to 8 steps; evaluate and release them.

    A verb works in a project, which is a folder with a params.yaml: the
    current folder, or that of --project or --params. `lcmlora run` brings
    every adapter of the project up to date: it runs the stages whose inputs
    have changed, then tests, registers and publishes the adapters.

    Examples:

      lcmlora run                          bring all models up to date

      lcmlora distill emoji                one stage of one model

      lcmlora --project ~/owls status      the models of the project in that folder
    """,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lcmlora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    call: typer.Context,
    params: Annotated[
        Path | None, typer.Option(help="The file with the settings; params.yaml by default.", show_default=False)
    ] = None,
    project: Annotated[
        Path | None,
        typer.Option(
            help="The project's folder; that of --params, or the current one, by default.", show_default=False
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    call.obj = Context.of(params, project)


app.command()(projects.init)
app.command()(projects.upgrade)


@app.command()
def check(call: typer.Context) -> None:
    """Check params.yaml, and print its models with their main settings.

    A mistake is printed in one line with the key, the value and what was expected. `lcmlora config` prints all
    settings.

    Example: lcmlora check
    """
    context = context_of(call)
    config = context.settings()
    from lcmlora.projects import record

    if advice := record.advice(context.project.root):
        note(advice)
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
    """List the bases of params.yaml, with the number of parameters of each UNet and of its adapter.

    Nothing is downloaded: a base that is not here is described by the configuration of its family.

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
    """Write resolved.yaml: the settings and stage versions that decide the results, which DVC reads as parameters.

    `dvc repro` and the flow do this first. Then a changed setting, default or stage version makes the stages that
    depend on it run again. If a base has got `data` of its own, or has it no more, the stages in dvc.yaml that read
    pictures are updated, too.

    Example: lcmlora resolve
    """
    context = context_of(call)
    config, project = context.settings(), context.project
    from lcmlora.dvc_files import dvc_yaml, resolved

    if "DVC_STAGE" in os.environ:  # DVC has read dvc.yaml already, and would go on with the old one
        dvc_yaml.check(config, project)
    else:
        from lcmlora.projects import generated

        if generated.refresh_dvc_yaml(config, project):
            note(f"{project.dvc_yaml}: the stages that read pictures are updated")
    changed = resolved.refresh(config, project.resolved)
    note(f"{project.resolved}: {'is up to date now' if changed else 'was up to date'}")


@app.command()
def fetch(call: typer.Context, model: Model) -> None:
    """Put a base into bases/MODEL: download it from the hub at its revision, link a local folder, or convert a file.

    Its files, tensor shapes and tokenizers are examined once. Its precision and its digest are printed.

    Example: lcmlora fetch sd15
    """
    context = context_of(call)
    base, project = context.settings().base(model), context.project
    from lcmlora.bases import fetching
    from lcmlora.bases.examination.examine import examine_base

    folder = fetching.fetch(model, base, project.bases, project.root)
    say(folder)
    note(f"{model}: {examine_base(model, folder, base.variant)}")


for _name, _stage in VERBS.items():
    app.command(_name, cls=StageCommand)(_stage)


app.command()(doctor.doctor)
for _verb in (
    *(verbs.convert, verbs.combine, verbs.generate, verbs.comfyui, verbs.remeasure),
    *(presenting.report, presenting.serve),
    *(registry.approve, registry.reject),
):
    app.command()(_verb)
app.add_typer(data.app, name="data")
app.add_typer(prompts.app, name="prompts")
app.add_typer(registry.app, name="registry")
app.add_typer(releases.app, name="releases")


def add_declared_verbs(declared: Iterable[importlib.metadata.EntryPoint]) -> None:
    """Adds the verbs of entry points in the group `lcmlora.verbs`: of flows/, and of other packages."""
    for entry in declared:
        try:
            verb = entry.load()
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist else entry.module
            note(f"warning: {package} declares the verb {entry.name} as {entry.value}, and {error}")
        else:
            app.command(entry.name)(verb)


def main() -> None:
    """Runs the command line. A UserError is printed in one line and ends it with status 2."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # defaults, which the libraries read when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    rank = os.environ.get("RANK", "0")
    with reporting_errors("" if rank == "0" else f"process {rank}: ", faults.verb_of(sys.argv[1:])):
        add_declared_verbs(importlib.metadata.entry_points(group="lcmlora.verbs"))
        app()


if __name__ == "__main__":
    main()
