"""`lcmlora init` and `lcmlora upgrade`: a project of one's own. Heavy imports happen inside the verbs."""

from __future__ import annotations

import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora import extras
from lcmlora.cli.context import context_of
from lcmlora.errors import UserError
from lcmlora.io.terminal import note, say

if TYPE_CHECKING:
    from lcmlora.config import Config
    from lcmlora.project import Project
    from lcmlora.projects.choices import Ask, BaseOptions
    from lcmlora.projects.databases.outdated import Database
    from lcmlora.projects.init import Plan
    from lcmlora.projects.record import Workers
    from lcmlora.projects.upgrade.costs import Cost
    from lcmlora.projects.upgrade.plan import Upgrade


class Pool(StrEnum):
    """Kinds of work pools, besides processes, for which a project has job templates."""

    DOCKER = "docker"
    KUBERNETES = "kubernetes"


_WORKERS: dict[Pool, Workers] = {Pool.DOCKER: "docker", Pool.KUBERNETES: "kubernetes"}

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The project's folder; it is made.", show_default=False)]
_Base = Annotated[
    str | None,
    typer.Option(
        help="emoji (the demo), a published base (sd15, sd21, sdxl, ssd1b), a diffusers folder, a .safetensors "
        "checkpoint, or a hub id, OWNER/NAME or OWNER/NAME@COMMIT.",
        show_default=False,
    ),
]
_Like = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILY",
        help="The family whose settings the base gets (sd15, sd21, sdxl), where its files do not tell.",
        show_default=False,
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Captioned pictures: a folder, .parquet or .tar files, here or at s3://bucket/prefix.",
        show_default=False,
    ),
]
_Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Instead of pictures: a file with a prompt in each line, of which the base draws the pictures.",
        show_default=False,
    ),
]
_Publish = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Where releases are published: a folder, or s3://bucket/prefix. By default releases/ in the project.",
        show_default=False,
    ),
]
_With = Annotated[
    list[Pool] | None,
    typer.Option("--with", help="Add job templates for this kind of workers; repeatable.", show_default=False),
]
_Name = Annotated[
    str | None,
    typer.Option(help="The model's name; the adapter is lcm-lora-NAME. By default the base's.", show_default=False),
]
_License = Annotated[
    str | None, typer.Option("--license", help="The base's license, for the adapter's card.", show_default=False)
]
_Config = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Of a .safetensors base: the diffusers folder or hub id with its configuration and tokenizers.",
        show_default=False,
    ),
]
_Kind = Annotated[
    str | None,
    typer.Option(
        help="The kind of --data: folder, parquet or webdataset. By default it follows from the files' names.",
        show_default=False,
    ),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Print params.yaml and the files, and write nothing.")]


def init(
    folder: _Folder,
    base: _Base = None,
    like: _Like = None,
    data: _Data = None,
    prompts: _Prompts = None,
    publish: _Publish = None,
    workers: _With = None,
    name: _Name = None,
    license_: _License = None,
    config: _Config = None,
    kind: _Kind = None,
    dry_run: _DryRun = False,
) -> None:
    """Make a project in a new folder: settings, stages, schedule, a Git and a DVC repository.

    On a terminal you are asked for what you leave out. Paths are as your shell sees them; the project finds them from
    wherever it is called. A folder that exists keeps all of its files: if one is in the way, nothing is written.

    Examples:

      lcmlora init demo --base emoji                       the demo, for a CPU

      lcmlora init owls --base sdxl --data /data/owls      pictures with captions

      lcmlora init words --base sd15 --prompts words.txt   prompts alone

      lcmlora init mine --base mine.safetensors --data /data/owls --publish s3://bucket/lcm

      lcmlora init fleet --base sdxl --data s3://bucket/owls --with kubernetes
    """
    extras.require("dvc", extra="pipeline", needed_by="lcmlora init")
    from lcmlora.projects.choices import BaseOptions
    from lcmlora.projects.init import write

    options = BaseOptions(name=name, like=like, config=config, license=license_)
    plan = _plan(folder, base, options, data, prompts, kind, publish, workers or [])
    if dry_run:
        say(plan.own["params.yaml"])
        for path in plan.written:
            say(folder / path)
        return
    write(plan)
    _show_what_is_next(plan)


def _plan(
    root: Path,
    base: str | None,
    options: BaseOptions,
    data: str | None,
    prompts: str | None,
    kind: str | None,
    publish: str | None,
    workers: list[Pool],
) -> Plan:
    from lcmlora.projects import choices
    from lcmlora.projects.init import plan_demo, plan_project, refuse_a_project

    refuse_a_project(root)
    ask = _ask if sys.stdin.isatty() and sys.stderr.isatty() else None
    known = "emoji for the demo, sd15, sd21, sdxl, ssd1b, a folder, a .safetensors file, a hub id"
    base = _given("--base", base, f"The base ({known})", "emoji", ask)
    pools = tuple(dict.fromkeys(_WORKERS[pool] for pool in workers))
    if data is not None and prompts is not None:
        raise UserError(
            "--data and --prompts exclude each other: a model learns from pictures or from prompts; prompts that the "
            "evaluation is to draw stand in params.yaml, evaluation.prompts"
        )
    if kind is not None and data is None:
        raise UserError("--kind: goes with --data")
    to = None if publish is None else choices.choose_store(publish, root)
    if base == choices.EMOJI:
        options.refuse(base)
        if data is not None or prompts is not None:
            raise UserError("--base emoji is the demo and has data of its own, at 64 pixels; choose another base")
        return plan_demo(root, to, pools)
    chosen = choices.choose_base(base, options, root, ask)
    if prompts is not None:
        pictures = choices.choose_prompts(prompts, root)
    else:
        question = "The captioned pictures (a folder, .parquet or .tar files, s3://...), or a .txt file of prompts"
        pictures = choices.choose_data(_given("--data", data, question, None, ask), kind, root)
    if publish is None and ask is not None:
        answer = ask("Where releases are published (a folder, or s3://bucket/prefix)", _RELEASES)
        to = None if answer == _RELEASES else choices.choose_store(answer, root)
    return plan_project(root, chosen, pictures, to, pools)


_RELEASES = "releases/ in the project"  # the answer for the default


def _given(option: str, value: str | None, question: str, default: str | None, ask: Ask | None) -> str:
    """Returns the option's value, or the answer of a person. Raises UserError where nobody can answer."""
    if value is not None:
        return value
    if ask is None:
        example = "lcmlora init owls --base sdxl --data /data/owls"
        raise UserError(f"{option}: is missing, and this is no terminal to ask on; for example: {example}")
    return ask(question, default)


def _ask(question: str, default: str | None) -> str:
    answer: str = typer.prompt(question, default=default, err=True)
    return answer.strip()


def _show_what_is_next(plan: Plan) -> None:
    (model,) = plan.settings.models
    folder = shlex.quote(os.fspath(plan.root))
    note(f"made the project {plan.root}, with {len(plan.written)} files; README.md has its commands")
    if plan.root.resolve() != Path.cwd():
        say(f"cd {folder}")
    say(f"lcmlora doctor {model}     # does it fit this machine, and how long does it take?")
    say("lcmlora run")


def upgrade(
    call: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Write the files without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and write nothing.")] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            help="Run some steps of each stale distillation whose latent cache is here, as `lcmlora doctor` does."
        ),
    ] = True,
) -> None:
    """Bring a project to the installed version: rewrite its generated files, and convert settings that were renamed.

    It first shows what changes, which stages become stale, why, and how
    long they take as far as this machine knows. Then it asks. Your changes
    of generated files stay: they are merged, or the new text is written
    beside the file. Databases of an earlier MLflow or Prefect are changed
    after a backup. Nothing runs: `dvc repro` or `lcmlora run` does that.

    The files must be committed to Git, which brings the former ones back.

    Examples:

      lcmlora upgrade --dry-run            show what would change

      lcmlora upgrade                      show it, ask, and write the files
    """
    project = context_of(call).project
    if project.params is not None:
        raise UserError("--params: upgrade rewrites the project's own params.yaml; name its folder with --project")
    from lcmlora.projects.databases import outdated as databases
    from lcmlora.projects.upgrade.plan import BESIDE, apply, plan_upgrade, refuse_losses

    plan = plan_upgrade(project)
    outdated = databases.outdated(project, plan.settings.registry.tracking_uri)
    if not plan.is_needed and not outdated:
        say(f"{project.params_file}: the project is up to date with lcmlora {plan.record.lcmlora}")
        return

    _show(plan, outdated, project, estimate)
    if dry_run:
        return
    refuse_losses(plan)
    if outdated:
        databases.refuse_running(project)
    if not yes and not _agreed():
        say("nothing was written")
        return
    apply(plan)
    for path in plan.beside:
        say(f"{path}{BESIDE}: merge it into {path}, then delete it")
    if outdated:  # after the files, since a backup reads the settings; what is interrupted here, the next call does
        _upgrade_databases(project, outdated)
    say("written; look at it with `git diff`, then commit it. `dvc repro` or `lcmlora run` runs what is stale")


def _show(plan: Upgrade, outdated: list[Database], project: Project, estimate: bool) -> None:
    from lcmlora.projects import durations
    from lcmlora.projects.databases.outdated import BACKUPS
    from lcmlora.projects.upgrade import costs, report

    def doctor(model: str) -> Cost | None:
        return _estimated(project, plan.settings, model) if estimate else None

    for line in report.lines(plan, costs.stage_costs(plan.outlook, durations.read(project), doctor)):
        say(line)
    if outdated:
        say(f"databases, after a backup of the project to {BACKUPS}/")
        for database in outdated:
            say(f"  {database}")


def _upgrade_databases(project: Project, outdated: list[Database]) -> None:
    from lcmlora.projects.databases import outdated as databases

    note("making a backup ...")
    say(f"the backup is in {databases.save(project)}; `lcmlora restore` brings it back")
    for database in outdated:
        databases.upgrade(database, project)
        say(f"{database.name}: has the tables of the installed {database.owner}")


def _agreed() -> bool:
    """Asks on the terminal. Raises UserError where there is none."""
    if not sys.stdin.isatty():
        raise UserError("nothing was written: there is no terminal to ask on; with --yes the files are written")
    return typer.confirm("Do this?")


def _estimated(project: Project, config: Config, model: str) -> Cost | None:
    """Returns what the doctor estimates for the distillation of a model. None if there is no latent cache to try it."""
    from lcmlora.projects.upgrade.costs import Cost

    if not project.latents(model).is_dir():
        return None
    note(f"{model}: trying some steps of the distillation (--no-estimate leaves this out)")
    settings, scratch = config.distill_for(model), project.scratch("distill")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        extras.require(extra="train", needed_by="the estimate")
        from lcmlora.cli.stages.loading import base_and_cache
        from lcmlora.doctor.measuring import estimate_run

        base, cache = base_and_cache(project, config, model, settings, pictures=True)
        seconds = estimate_run(base, cache, settings, config.launch_for(model), scratch).total
    except UserError as error:  # such as a cache of the former version, which `encode` is to make anew
        return Cost(None, f"doctor: {error}")
    return Cost(seconds, "doctor")
