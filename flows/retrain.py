"""The main job: every model through its stale stages, then gate, registry, release; and what became of each.

python -m flows.retrain --help
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and reads its settings
    from flows.command import main

    main()

import contextlib
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed
from rich.console import Console
from rich.table import Table

from flows import choose
from lcmlora import config
from lcmlora.errors import UserError
from tasks import dvc
from tasks.models import (
    fetch_base,
    pass_gate,
    point_channel,
    promote_version,
    publish_release,
    read_champion,
    read_metrics,
    register_release,
)
from tasks.processes import Processes

STAGES = ("encode", "reference", "distill", "evaluate")  # of a model, in order; `prepare` is shared


@dataclass
class Outcome:
    """What became of one model."""

    model: str
    ran: list[dvc.StageResult] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    figures: dict[str, Any] | None = None
    champion: str | None = None  # that the gate compared with
    gate_failures: list[str] | None = None
    version: str | None = None
    created: bool = False
    uri: str | None = None
    errors: list[str] = field(default_factory=list)


@flow(name="retrain")
def retrain(
    models: list[str] | None = None,
    force: bool = False,
    publish: bool = True,
    promote: bool = True,
    to: str | None = None,
    params: str = "params.yaml",
) -> State:
    """Brings every model up to date: stale stages, gate, registered version, published release, alias.

    Ends as Completed, as UpToDate where nothing was stale, or as Failed where a model failed; the others are finished
    all the same. Run it in the project's folder.

    Args:
        models: names under `models` in params.yaml; all of them if left out.
        force: run every stage, stale or not.
        publish: publish the releases.
        promote: give a version that passed the gate the alias, and point the channel at its release.
        to: where releases go instead of `publish.to`: a directory or s3://bucket/prefix.
        params: the settings of everything outside DVC; the stages read the params.yaml beside dvc.yaml.
    """
    began = time.monotonic()
    settings = config.load(Path(params))
    if to is not None:
        settings = settings.model_copy(update={"publish": settings.publish.model_copy(update={"to": to})})
    outcomes = [Outcome(model) for model in choose(settings, models)]
    with Processes() as processes:
        _run_stages(outcomes, settings, force, processes)
        for outcome in outcomes:
            if not outcome.errors:
                _release(outcome, settings, publish, promote, processes)
        _share(outcomes, processes)

    idle = not any(outcome.ran or outcome.created or outcome.errors for outcome in outcomes)
    total = f"{'nothing was stale, ' if idle else ''}{time.monotonic() - began:.0f} s"
    rows = [(outcome.model, *row) for outcome in outcomes for row in _rows(outcome, settings.gate.steps)]
    _print_table(rows, total)
    lines = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)
    create_markdown_artifact(f"| model | | |\n|---|---|---|\n{lines}\n\n{total}", key="retrain")
    failed = [f"{outcome.model}: {error}" for outcome in outcomes for error in outcome.errors]
    if failed:
        return Failed(message="\n".join(failed))
    return Completed(name="UpToDate" if idle else "Completed", message=total)


def stages_of(model: str, settings: config.Config) -> list[str]:
    """Returns the names of the model's DVC stages in their order."""
    names = [f"{stage}@{model}" for stage in STAGES]
    studied = settings.studied(model)
    for kind, name in studied:
        names += [f"{kind}@{model}-{name}", f"{kind}-alone@{model}-{name}"]
    return [*names, *([f"study@{model}"] if studied else []), f"package@{model}"]


def _run_stages(outcomes: list[Outcome], settings: config.Config, force: bool, processes: Processes) -> None:
    due: set[str] = set()
    pull = prepared = False
    names = {outcome.model: stages_of(outcome.model, settings) for outcome in outcomes}
    with _noting(*outcomes):
        everything = ["prepare", *(name for own in names.values() for name in own)]
        due = set(everything) if force else dvc.stale(everything, processes)
        pull = bool(due) and dvc.default_remote(processes) is not None
    if any(outcome.errors for outcome in outcomes):
        return
    for outcome in outcomes:
        # A base is a dependency and its revision a parameter, so one that has to be fetched anew is among what is due.
        if due & {"prepare", *names[outcome.model]}:
            with _noting(outcome):
                fetch_base(outcome.model, settings)
    with _noting(*outcomes):
        prepared = _run("prepare", "prepare" in due, outcomes, processes, force, pull)
    for outcome in outcomes:
        if outcome.errors:
            continue
        with _noting(outcome):
            stale = changed = prepared
            for name in names[outcome.model]:
                # What follows a stale stage may be stale when its turn comes; what precedes the first one is not.
                stale = stale or name in due
                examined = name.startswith("distill@") and _has_gpu(settings.distill_for(outcome.model))
                if examined and (changed or name in due):
                    dvc.examine(outcome.model, processes)
                changed = _run(name, stale, [outcome], processes, force, pull)


def _has_gpu(distill: config.Distill) -> bool:
    """Returns whether the model is distilled on a GPU, asked without torch, which takes seconds to import."""
    return distill.device == "cuda" or (distill.device == "auto" and shutil.which("nvidia-smi") is not None)


def _run(name: str, due: bool, outcomes: list[Outcome], processes: Processes, force: bool, pull: bool) -> bool:
    """Runs a stage that is due, writes down what became of it, and returns whether it ran."""
    result = dvc.run_stage(name, processes, force, pull) if due else None
    for outcome in outcomes:
        if result and result.ran:
            outcome.ran.append(result)
        else:
            outcome.fresh.append(name)
    return bool(result and result.ran)


def _release(outcome: Outcome, settings: config.Config, publish: bool, promote: bool, processes: Processes) -> None:
    """Gate, publication, registration, promotion; an unreachable bucket does not keep a version from the registry."""
    model = outcome.model
    with _noting(outcome):
        outcome.figures = read_metrics(model)
        # Released although the registry is out of reach: nothing is lost, and the next run registers it.
        with _noting(outcome):
            champion = read_champion(model, outcome.figures, settings, processes)
            outcome.champion = champion.reference if champion else None
            outcome.gate_failures = pass_gate(model, outcome.figures, champion, settings)
        if publish:
            with _noting(outcome):
                outcome.uri = publish_release(model, settings)
        if outcome.gate_failures is None:
            return
        registered = register_release(model, settings, outcome.uri, outcome.gate_failures)
        outcome.version = f"{registered.name}/{registered.version}"
        outcome.created = registered.created
        aliases = set(registered.aliases)
        # A version that was promoted before and is not champion now was rolled back by a person.
        if promote and not outcome.gate_failures and not registered.promoted:
            promote_version(model, registered, settings)
            aliases.add(settings.registry.alias)
        outcome.version += "".join(f" @{alias}" for alias in sorted(aliases))
        if promote and settings.registry.alias in aliases and outcome.uri:
            point_channel(model, registered.sha256, settings)


def _share(outcomes: list[Outcome], processes: Processes) -> None:
    """Sends to the DVC remote that others read, where there is one, what is not there yet.

    Also where nothing ran: the last run may have been killed before it came here.
    """
    with _noting(*outcomes):
        if dvc.is_shared(dvc.default_remote(processes)):
            dvc.push(processes)


@contextlib.contextmanager
def _noting(*outcomes: Outcome) -> Iterator[None]:
    """Writes an error down in these outcomes, so that the other models go on. Interrupts pass."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        for outcome in outcomes:
            outcome.errors.append(line)


def _rows(outcome: Outcome, gate_steps: int) -> list[tuple[str, str]]:
    """Returns what a person wants to know of a model, in pairs."""

    def short(stage: str) -> str:
        return stage.replace(f"@{outcome.model}", "")

    rows = [("ran", ", ".join(f"{short(r.stage)} {r.seconds:.0f} s" for r in outcome.ran) or "nothing")]
    rows += [("up to date", ", ".join(map(short, outcome.fresh)))] if outcome.fresh else []
    if outcome.figures is not None:
        rows += _figures(outcome.figures, gate_steps)
    if outcome.gate_failures is not None:
        passed = "passed" + (f", compared with {outcome.champion}" if outcome.champion else "")
        rows += [("gate", f"failed: {line}") for line in outcome.gate_failures] or [("gate", passed)]
    if outcome.version:
        rows.append(("version", outcome.version + (" (new)" if outcome.created else "")))
    if outcome.uri:
        rows.append(("release", _relative(outcome.uri)))
    elif outcome.figures is not None:
        rows.append(("release", f"release/{outcome.model}, not published"))
    return rows + [("error", error) for error in outcome.errors]


def _figures(figures: dict[str, Any], gate_steps: int) -> list[tuple[str, str]]:
    """Returns the student's excess beside the best solver's at equal network evaluations, and the retrieval."""
    rows = []
    excess, retrieval = figures["excess"], figures["retrieval"]
    for steps in sorted({2, gate_steps}):
        rivals = [n for n in excess if "@" in n and not n.startswith(("student", "teacher"))]
        rivals = [n for n in rivals if figures["network_evaluations"][n] == steps]
        best = min(rivals, key=excess.__getitem__, default=None)
        if f"student@{steps}" in excess:
            beside = f", best solver {excess[best]:.1f} ({best})" if best else ", no solver"
            rows.append((f"excess at {steps} evaluations", f"student {excess[f'student@{steps}']:.1f}{beside}"))
    known = [name for name in (f"student@{gate_steps}", *retrieval) if name in retrieval]
    shown = [name for name in dict.fromkeys(known) if name.startswith(("teacher", f"student@{gate_steps}"))]
    return [*rows, ("retrieval@1", ", ".join(f"{name} {retrieval[name]:.3f}" for name in shown))]


def _relative(uri: str) -> str:
    """Returns a path for what lies below the current folder, the address as it is otherwise."""
    path = Path(urlparse(uri).path)
    return str(path.relative_to(Path.cwd())) if uri.startswith("file:") and path.is_relative_to(Path.cwd()) else uri


def _print_table(rows: list[tuple[str, str, str]], total: str) -> None:
    table = Table(show_header=False, caption=total)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for number, (model, what, value) in enumerate(rows):
        first = number == 0 or rows[number - 1][0] != model
        if first and number:
            table.add_section()
        table.add_row(model if first else "", what, value)
    # No markup: a path in brackets is no style.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, markup=False, highlight=False).print(table)
