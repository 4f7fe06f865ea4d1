"""`lcmlora run` on a terminal, and `python -m flows.retrain`. Mistakes are found before Prefect is imported."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lcmlora.cli.shell import completion
from lcmlora.errors import UserError
from lcmlora.flows import choose
from lcmlora.flows.verbs import enter, note_unused_servers, standalone
from lcmlora.io.terminal import note

_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> NoReturn:
    """Runs the command line and ends the process with 0, with 1 if a model failed, with 2 if nothing was started."""
    standalone("flows.retrain", run)


def run(
    call: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Names under `models` in params.yaml. All of them by default.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model, as the arguments name them. Repeatable.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage, even if it is up to date.")] = False,
    publish: Annotated[
        str | None,
        typer.Option(
            metavar="STORE", help="Publish to this directory, s3://bucket/prefix or hf://owner/name, not to publish.to."
        ),
    ] = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Do not publish.")] = False,
    promote: Annotated[bool, typer.Option(help="Give the alias (champion) to a version that passed the gate.")] = True,
) -> None:
    """Bring every model up to date.

    This runs the stale stages, decides by the gate, publishes the release, registers it as a version, and makes the
    version champion. No server is needed. If it is killed, run it again: it goes on from where it was. The exit status
    is 1 if a model failed, 2 if nothing was started.

    Examples:

      lcmlora run                             all models of params.yaml

      lcmlora run emoji --force               one model, every stage

      lcmlora run --publish s3://models/lcm   publish to another store

      lcmlora run --no-promote                leave the champion as it is
    """
    if publish is not None and no_publish:
        raise UserError("--publish and --no-publish exclude each other")
    if publish is not None and "://" not in publish:
        publish = str(Path(publish).absolute())  # before the project's folder becomes the current one
    project = enter(call)
    chosen = [*(models or ()), *(model or ())] or None
    choose(project.settings(), chosen)
    if not project.dvc_yaml.is_file():
        raise UserError(f"{project.dvc_yaml}: no such file; `lcmlora init` makes a project with it")
    _run(chosen, force, not no_publish, promote, publish)


def _run(models: list[str] | None, force: bool, publish: bool, promote: bool, to: str | None) -> None:
    """Runs the flow in the current folder, and ends the process with 1 if a model failed."""
    from lcmlora.tasks.processes import end_children_with_this_process

    note_unused_servers()
    for ending in _ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:  # nohup ignores one
            signal.signal(ending, _interrupt)  # by default Python would end at once, and the trainer would go on
    # Otherwise Prefect's temporary server would outlive a flow that is killed.
    end_children_with_this_process()
    print("starting Prefect ...", file=sys.stderr, flush=True)
    from lcmlora.flows.retrain import retrain_models
    from lcmlora.tasks.outages.temporary_server import keeping_temporary_server
    from lcmlora.tasks.prefect_internals import keep_temporary_server_apart

    keep_temporary_server_apart()
    with keeping_temporary_server():
        state = retrain_models(models, force, publish, promote, to, return_state=True)
    if not state.is_completed():
        note(state.message, "error: ")
        raise SystemExit(1)


def _interrupt(number: int, frame: object) -> NoReturn:
    for ending in _ENDINGS:
        signal.signal(ending, _leave)
    raise SystemExit(128 + number)


def _leave(number: int, frame: object) -> NoReturn:
    """Exits at once on a second signal. The processes that are left end, too (see `end_children_with_this_process`)."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    raise SystemExit(128 + number)
