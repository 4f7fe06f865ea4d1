"""Verbs that show an adapter to others: `report`, its page, and `serve`, pictures over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora import extras, masking
from lcmlora.cli.context import Context, context_of
from lcmlora.cli.shell import completion
from lcmlora.errors import UserError
from lcmlora.io.terminal import note, say

if TYPE_CHECKING:
    from lcmlora.config import Config

_LONGEST_LABEL = 200  # characters of the adapter's name in metrics
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def report(
    call: typer.Context,
    reference: Annotated[
        str | None,
        typer.Argument(
            metavar="REF",
            help="An adapter: MODEL (release/MODEL), MODEL@ALIAS, MODEL/VERSION, a folder, a SHA-256 or an address. "
            "All models of the project by default.",
            show_default=False,
            autocompletion=completion.adapters,
        ),
    ] = None,
    in_browser: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Print where the report page of an adapter is: its pictures and figures beside the teacher's and the solvers'.

    That of MODEL was made by the last run; that of a version or release is downloaded first. `lcmlora summary` tells
    what happened in the last days instead.

    Examples:

      lcmlora report

      lcmlora report emoji@champion --open
    """
    context = context_of(call)
    pages = [_page(context, name) for name in ([reference] if reference else context.settings().models)]
    for page in pages:
        say(page)
        if in_browser and not webbrowser.open(page.absolute().as_uri()):
            raise UserError(f"{page}: cannot be opened: there is no browser here; $BROWSER names one")


def _page(context: Context, reference: str) -> Path:
    places = context.places(context.settings_if_any())
    from lcmlora.registry.references import open_release
    from lcmlora.releases.bundle import REPORT

    page = open_release(reference, places, everything=True) / REPORT
    if not page.is_file():
        raise UserError(f"{page}: no such file; this release has no report page")
    return page


def serve(
    call: typer.Context,
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="The adapter: MODEL (release/MODEL), MODEL@ALIAS, MODEL/VERSION, models:/..., a folder, a SHA-256 or "
            "an address.",
            show_default=False,
            autocompletion=completion.adapters,
        ),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 5001,
    host: Annotated[
        str, typer.Option(help="The address to listen on. 0.0.0.0 lets other machines ask; there is no password.")
    ] = "127.0.0.1",
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="A base in params.yaml or a diffusers folder; the adapter's own base by default.",
            autocompletion=completion.bases,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    fuse: Annotated[bool, typer.Option("--fuse", help="Add the adapter to the base's weights: faster steps.")] = False,
    seconds: Annotated[int, typer.Option(min=1, help="The longest time of one request.")] = 60,
) -> None:
    """Draw pictures for requests over HTTP with an adapter, until interrupted.

    It is MLflow's server: POST /invocations takes {"dataframe_records": [{"prompt": "owl"}], "params": {"steps": 4}}
    and answers with PNGs in base64. Without steps it draws in the fewest that are within the release's gate.
    LCMLORA_MAX_... limit a request. GET /metrics answers with metrics for Prometheus. To run the schedules of
    prefect.yaml from one process, see `lcmlora schedule`.

    Examples:

      lcmlora serve emoji

      lcmlora serve sdxl@champion --port 8000 --fuse
    """
    context = context_of(call)
    config = context.settings_if_any()
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, got {device!r}")
    extras.require(extra="pipeline", needed_by="lcmlora serve")
    from lcmlora.inference import serving
    from lcmlora.inference.production.metrics import SERVED
    from lcmlora.registry.references import open_release

    release = open_release(reference, context.places(config))
    served = masking.text(reference)[:_LONGEST_LABEL]
    environment = {"LCMLORA_DEVICE": device, "LCMLORA_FUSE": str(int(fuse)), SERVED: served}
    if config is not None:
        environment |= _keeping(config, context.project.root)
    if base is not None:
        environment["LCMLORA_BASE"] = str(_base_folder(context, base, release))
    with tempfile.TemporaryDirectory(prefix="lcmlora-serve-") as folder:
        model = Path(folder, "model")
        serving.write_model_of(release, model)
        command = [sys.executable, "-P", "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
        command += ["-h", host, "-p", str(port), "--timeout", str(seconds)]
        note(f"serving {reference} at http://{host}:{port}/invocations; Ctrl-C ends it")
        status = _run(command, os.environ | environment, context.project.root)
    raise SystemExit(status)


def _keeping(config: Config, root: Path) -> dict[str, str]:
    """Returns the environment that says how prompts are kept. What is set already counts more."""
    from lcmlora.inference.production.kept_prompts import MODE, Keeping

    if MODE in os.environ:
        return {}
    asked = config.serving
    folder = (root / asked.prompts).absolute()
    return Keeping(asked.keep_prompts, folder, asked.prompts_a_day, asked.prompt_days).environment


def _base_folder(context: Context, name: str, release: Path) -> Path:
    config = context.settings_if_any()
    from lcmlora.cli.adapters.base_references import find_base
    from lcmlora.registry.references import Places, open_adapter

    found = find_base(name, open_adapter(str(release), Places(release)), config, context.project)
    assert found is not None  # a named base is found, or find_base raises
    if not found.folder.is_dir():
        raise UserError(f"{found.folder}: no such base folder; run `lcmlora fetch {found.name}`")
    return found.folder.absolute()


def _run(command: list[str], environment: dict[str, str], folder: Path) -> int:
    """Runs a server until it ends or a signal ends it, and returns its exit status, 128 + N after signal N."""
    received: list[int] = []
    # It starts another one, `uvicorn`, by its name, and this environment need not be activated.
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    process = subprocess.Popen(command, env=environment | {"PATH": programs}, cwd=folder, start_new_session=True)

    def end(number: int, frame: object) -> None:
        received.append(number)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)

    for each in _ENDINGS:
        signal.signal(each, end)
    status = process.wait()
    return 128 + received[0] if received else status
