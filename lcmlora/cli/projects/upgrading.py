"""`lcmlora upgrade`: bringing a project to the installed version. Heavy imports happen inside the verb."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora.cli.context import context_of
from lcmlora.errors import UserError
from lcmlora.io.terminal import note, say

if TYPE_CHECKING:
    from lcmlora.config import Config
    from lcmlora.project import Project
    from lcmlora.projects.upgrade.costs import Cost


def upgrade_project(
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
    beside the file. Nothing runs: `dvc repro` or `lcmlora run` does that.

    The files must be committed to Git, which brings the former ones back.

    Examples:

      lcmlora upgrade --dry-run            show what would change

      lcmlora upgrade                      show it, ask, and write the files
    """
    project = context_of(call).project
    if project.params is not None:
        raise UserError("--params: upgrade rewrites the project's own params.yaml; name its folder with --project")
    from lcmlora.projects import durations
    from lcmlora.projects.upgrade import costs, report
    from lcmlora.projects.upgrade.plan import apply, plan_upgrade

    plan = plan_upgrade(project)
    if not plan.is_needed:
        say(f"{project.params_file}: the project is up to date with lcmlora {plan.record.lcmlora}")
        return

    def doctor(model: str) -> Cost | None:
        return _estimated(project, plan.settings, model) if estimate else None

    for line in report.lines(plan, costs.stage_costs(plan.outlook, durations.read(project), doctor)):
        say(line)
    if dry_run:
        return
    if not yes and not _agreed():
        say("nothing was written")
        return
    apply(plan)
    say("written; look at it with `git diff`, then commit it. `dvc repro` or `lcmlora run` runs what is stale")


def _agreed() -> bool:
    """Asks on the terminal. Raises UserError where there is none."""
    if not sys.stdin.isatty():
        raise UserError("nothing was written: there is no terminal to ask on; with --yes the files are written")
    return typer.confirm("Write these files?")


def _estimated(project: Project, config: Config, model: str) -> Cost | None:
    """Returns what the doctor estimates for the distillation of a model. None if there is no latent cache to try it."""
    from lcmlora.projects.upgrade.costs import Cost

    if not project.latents(model).is_dir():
        return None
    note(f"{model}: trying some steps of the distillation (--no-estimate leaves this out)")
    from lcmlora.cli.stages import base_and_cache
    from lcmlora.distillation.doctor import estimate_run

    settings, scratch = config.distill_for(model), project.scratch("distill")
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        base, cache = base_and_cache(project, config, model, settings, pictures=True)
        seconds = estimate_run(base, cache, settings, config.launch_for(model), scratch).total
    except UserError as error:  # such as a cache of the former version, which `encode` is to make anew
        return Cost(None, f"doctor: {error}")
    return Cost(seconds, "doctor")
