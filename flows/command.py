"""`python -m flows.retrain` on a terminal. What can be refused without Prefect is refused before it starts."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from flows import choose
from lcmlora.cli.reporting import reporting
from lcmlora.errors import UserError
from lcmlora.io.terminal import note
from lcmlora.project import Project

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Set before Prefect is imported; whoever sets them otherwise is right.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The terminal shows the stages and the table; a Prefect server gets the whole log.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Its temporary server takes longer than the default 20 seconds where a training keeps all cores busy.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def main() -> NoReturn:
    """Runs the command line and ends the process: 0, 1 where a model failed, 2 where nothing could be started."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    with reporting():
        app(prog_name="python -m flows.retrain")
    raise SystemExit(0)


def run(
    model: Annotated[list[str] | None, typer.Option(help="A name under `models` in params.yaml; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage, stale or not.")] = False,
    publish: Annotated[
        str | None, typer.Option(metavar="TO", help="Publish there: a directory or s3://bucket/prefix.")
    ] = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Publish nowhere.")] = False,
    promote: Annotated[bool, typer.Option(help="Give a version that passed the gate the alias.")] = True,
) -> None:
    """Bring every model up to date: stale stages, gate, registered version, published release, alias.

    Runs in the project's folder, without any server. What a killed run left is continued.

    Examples:

      python -m flows.retrain                   all models of params.yaml

      python -m flows.retrain --model emoji --force   one model, every stage

      python -m flows.retrain --publish s3://models/lcm   releases go there, not where params.yaml says

      python -m flows.retrain --no-promote      leave the champion as it is
    """
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from tasks.processes import end_children_with_this_process

    project = Project()
    choose(project.settings(), model)
    if publish is not None and no_publish:
        raise UserError("--publish and --no-publish exclude each other")
    if not project.dvc_yaml.is_file():
        raise UserError(f"{project.dvc_yaml}: no such file; run in the project's folder")
    for ending in _ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, _interrupt)  # else Python ends at once, and the trainer goes on
    # Prefect's temporary server would outlive a flow that is killed.
    end_children_with_this_process()
    print("starting Prefect ...", file=sys.stderr, flush=True)
    from flows.retrain import retrain
    from tasks.prefect_internals import keep_temporary_server_apart

    keep_temporary_server_apart()
    state = retrain(model, force, not no_publish, promote, publish, return_state=True)
    if not state.is_completed():
        note(state.message, "error: ")
        raise SystemExit(1)


def _interrupt(number: int, frame: object) -> NoReturn:
    for ending in _ENDINGS:
        signal.signal(ending, _leave)
    note("ending what runs ...")
    raise SystemExit(128 + number)


def _leave(number: int, frame: object) -> NoReturn:
    """Exits at once on a second signal; `mark` makes the processes that are left end, too."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise SystemExit(128 + number)
