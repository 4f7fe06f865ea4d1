"""Verbs of `lcmlora` that need Prefect: up, down, login, watch, notify, summary. Heavy imports happen inside the verbs.

The others are beside what they do: `run` in command.py, `status` in status.py, `schedule` in serve.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lcmlora import extras
from lcmlora.cli.context import context_of
from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.errors import UserError
from lcmlora.io.parsing import as_object, read_json
from lcmlora.io.terminal import note, say
from lcmlora.project import Project

# Defaults, set before Prefect is imported.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The terminal shows the stages and the table. A Prefect server gets the whole log.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # Prefect's temporary server takes longer than the default 20 seconds when a training keeps all cores busy.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def enter(call: typer.Context) -> Project:
    """Makes the project's folder the current one, in which flows, stages and DVC work, and returns the project.

    Raises:
        UserError: there is no params.yaml, or --params names another file, whose settings the stages would not read; or
            Prefect, DVC or MLflow is not installed.
    """
    extras.require(extra="pipeline", needed_by=getattr(call, "command_path", ""))
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    project = context_of(call).project
    if project.params is not None:
        raise UserError(
            f"--params: the stages of a run read {project.root / 'params.yaml'}; name the project's folder with "
            "--project"
        )
    if not project.params_file.is_file():
        raise UserError(f"{project.params_file}: no such file; run in the project's folder or name it with --project")
    os.chdir(project.root)
    return Project()


def note_unused_servers() -> None:
    """Notes that the servers that `up` has started are not used, where the shell names none, or another project's."""
    state, sourced = Path(".up/state.json"), os.environ.get("LCMLORA_SERVERS")
    if sourced and Path(sourced) != state.parent.absolute():
        note(f"note: this shell has sourced {sourced}/environment, so that project's servers are used")
    if os.environ.get("PREFECT_API_URL") or not state.is_file():
        return
    if as_object(read_json(state), str(state)).get("started"):
        note("note: the servers that `lcmlora up` started are not asked: `source .up/environment` names them")


def up(call: typer.Context) -> None:
    """Start Prefect, MLflow and a worker on this machine, and deploy the flows of prefect.yaml.

    SeaweedFS is started, too, if no S3 is configured and it is installed. Run it again after a reboot, a crash, or a
    change of params.yaml or prefect.yaml: it starts what has died or has new settings, and leaves the rest running.
    Data, logs and addresses are in .up/.

    Example: lcmlora up
    """
    enter(call)
    from lcmlora.flows import stack

    stack.start()


def down(call: typer.Context) -> None:
    """End everything that `up` started, and cancel the runs. Data and logs stay in .up/.

    A training that was cancelled goes on from its last checkpoint in its next run.

    Example: lcmlora down
    """
    enter(call)
    from lcmlora.flows import stack

    stack.end()


def login(call: typer.Context) -> None:
    """Print the addresses of the servers that `up` started, with their names and passwords.

    Example: lcmlora login
    """
    enter(call)
    from lcmlora.flows import stack

    stack.print_logins()


def watch(call: typer.Context) -> None:
    """Look whether the pictures or a base have changed since the last look.

    With a Prefect server (PREFECT_API_URL), a change starts a run of `retrain`; `up` looks every
    quarter of an hour by itself. The first look only remembers what there is.

    Example: lcmlora watch
    """
    enter(call)
    from lcmlora.flows.overview import has_server
    from lcmlora.flows.watch import watch_inputs

    state = watch_inputs(return_state=True)
    if not state.is_completed():
        note(state.message, "error: ")
        raise SystemExit(1)
    for change in (state.message or "").split("; "):
        say(change)
    if state.name == "Changed" and not has_server():
        note("`lcmlora run` brings the models up to date")


def notify(
    call: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET", help="Names under notify.targets in params.yaml. All by default.", show_default=False
        ),
    ] = None,
) -> None:
    """Send a test message to those whom `notify` in params.yaml tells what has happened.

    The exit status is 1 if one of them has not taken it.

    Examples:

      lcmlora notify

      lcmlora notify team
    """
    settings = enter(call).settings()
    from lcmlora.flows import notify

    known = settings.notify.targets
    if not known:
        raise UserError("params.yaml: notify.targets: is empty; docs/notifications.md has examples")
    for name in targets or ():
        if name not in known:
            raise UserError(f"unknown target {name!r}: params.yaml notify.targets has {', '.join(known)}")
    asked = list(dict.fromkeys(targets or known))
    taken = notify.test(asked, settings)
    for name in taken:
        say(f"{name}: took the message")
    if len(taken) < len(asked):
        raise SystemExit(1)


def summary(call: typer.Context, days: Annotated[int, typer.Option(min=1, help="How many days back.")] = 7) -> None:
    """Print a summary of the last days in Markdown: champions, versions, runs, and what waits for a person.

    With a Prefect server, it is also made every Monday, as the artifact `digest`.

    Examples:

      lcmlora summary

      lcmlora summary --days 30 > month.md
    """
    project = enter(call)
    from lcmlora.flows.report import collect

    print(collect(project.settings(), days).text)


def standalone(module: str, *verbs: Callable[..., None]) -> NoReturn:
    """Runs verbs as the command line of `python -m MODULE`: one alone, or several by their names."""
    app = typer.Typer(no_args_is_help=len(verbs) > 1, add_completion=False, pretty_exceptions_enable=False)
    for verb in verbs:
        app.command()(verb)
    with reporting_errors():
        app(prog_name=f"python -m {module}")
    raise SystemExit(0)
