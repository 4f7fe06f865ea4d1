"""`lcmlora metrics`: metrics of runs and models for Prometheus. Heavy imports happen inside the verb."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora.errors import UserError
from lcmlora.flows.verbs import enter
from lcmlora.io.terminal import note

if TYPE_CHECKING:
    from lcmlora.flows.credentials import Login

_LOGIN = "LCMLORA_METRICS_LOGIN"  # environment: NAME:PASSWORD


def metrics(
    call: typer.Context,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 9464,
    host: Annotated[
        str,
        typer.Option(help=f"The address to listen on. For another than this machine's own, set {_LOGIN}."),
    ] = "127.0.0.1",
    seconds: Annotated[
        int, typer.Option(min=5, help="Seconds between two looks at MLflow and Prefect. A scrape asks neither.")
    ] = 60,
    textfile: Annotated[
        Path | None,
        typer.Option(
            help="Write the metrics to this file once, for node_exporter's textfile collector, and end.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show the metrics of runs and models to Prometheus, at /metrics, until interrupted.

    They are read from MLflow, DVC, the disk, and Prefect if PREFECT_API_URL names its server. A scrape reads what was
    seen at the last look, and asks no server. The metrics of a served adapter are at /metrics of `lcmlora serve`.

    Examples:

      lcmlora metrics

      lcmlora metrics --textfile /var/lib/node_exporter/lcmlora.prom
    """
    textfile = None if textfile is None else textfile.absolute()  # before the project's folder is the current one
    project = enter(call)
    login = _login()
    project.settings()  # a mistake in params.yaml is told now
    from lcmlora.flows.monitoring import exporter, sources
    from lcmlora.flows.overview import has_server

    if not has_server():
        note("note: PREFECT_API_URL is not set, so there are no metrics of runs")
    made = exporter.Exporter(sources.sources(seconds), project.settings)
    if textfile is not None:
        if not textfile.parent.is_dir():
            raise UserError(f"--textfile {textfile}: {textfile.parent} is no folder")
        raise SystemExit(0 if exporter.write(made, textfile) else 1)
    exporter.serve(made, host, port, login)


def _login() -> Login | None:
    """Returns the login that the environment sets, None where it sets none."""
    from lcmlora.flows.credentials import Login

    name, separator, password = os.environ.get(_LOGIN, "").partition(":")
    if not (name or password):
        return None
    if not (separator and name and password):
        raise UserError(f"{_LOGIN}: expected NAME:PASSWORD")
    return Login(name, password)
