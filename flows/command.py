"""`python -m flows.retrain` on a terminal. Mistakes in the command are found before Prefect is imported."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from lcmlora import extras
from lcmlora.cli.reporting import reporting_errors
from lcmlora.errors import UserError
from lcmlora.flows import choose
from lcmlora.io.terminal import note
from lcmlora.project import Project

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Defaults, set before Prefect is imported.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The terminal shows the stages and the table. A Prefect server gets the whole log.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Prefect's temporary server takes longer than the default 20 seconds when a training keeps all cores busy.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def main() -> NoReturn:
    """Runs the command line and ends the process with 0, with 1 if a model failed, with 2 if nothing was started."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    with reporting_errors():
        app(prog_name="python -m flows.retrain")
    raise SystemExit(0)


def run(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A name under `models` in params.yaml; repeatable. All of them by default."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage, even if it is up to date.")] = False,
    publish: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Publish to this directory or s3://bucket/prefix, not to publish.to."),
    ] = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Do not publish.")] = False,
    promote: Annotated[bool, typer.Option(help="Give the alias (champion) to a version that passed the gate.")] = True,
) -> None:
    """Bring every model up to date.

    This runs the stale stages, decides by the gate, publishes the release, registers it as a version, and makes the
    version champion. Run it in the project's folder; no server is needed. If it is killed, run it again: it goes on
    from where it was.

    Examples:

      python -m flows.retrain                             all models of params.yaml

      python -m flows.retrain --model emoji --force       one model, every stage

      python -m flows.retrain --publish s3://models/lcm   publish to another store

      python -m flows.retrain --no-promote                leave the champion as it is
    """
    extras.require(extra="pipeline", needed_by="retraining")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from lcmlora.tasks.processes import end_children_with_this_process

    project = Project()
    choose(project.settings(), model)
    if publish is not None and no_publish:
        raise UserError("--publish and --no-publish exclude each other")
    if not project.dvc_yaml.is_file():
        raise UserError(f"{project.dvc_yaml}: no such file; run in the project's folder")
    for ending in _ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:  # nohup ignores one
            signal.signal(ending, _interrupt)  # by default Python would end at once, and the trainer would go on
    # Otherwise Prefect's temporary server would outlive a flow that is killed.
    end_children_with_this_process()
    print("starting Prefect ...", file=sys.stderr, flush=True)
    from lcmlora.flows.retrain import retrain_models
    from lcmlora.tasks.prefect_internals import keep_temporary_server_apart

    keep_temporary_server_apart()
    state = retrain_models(model, force, not no_publish, promote, publish, return_state=True)
    if not state.is_completed():
        note(state.message, "error: ")
        raise SystemExit(1)


def _interrupt(number: int, frame: object) -> NoReturn:
    for ending in _ENDINGS:
        signal.signal(ending, _leave)
    note("ending the processes that run ...")
    raise SystemExit(128 + number)


def _leave(number: int, frame: object) -> NoReturn:
    """Exits at once on a second signal. The processes that are left end, too (see `end_children_with_this_process`)."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise SystemExit(128 + number)
