"""The main job: every model through its stale stages, then gate, registry, release; and what became of each.

python -m flows.retrain --help
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and reads its settings
    from flows.command import main

    main()

import concurrent.futures
import contextlib
import contextvars
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from prefect import State, flow, get_run_logger
from prefect.states import Completed, Failed
from pydantic import Field

from flows import choose, outcomes
from flows.outcomes import Outcome
from lcmlora import config, masking
from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.io.terminal import note
from tasks import dvc
from tasks.devices import occupied
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
from tasks.retrying import networked

STAGES = ("encode", "reference", "distill", "evaluate")  # of a model, in order, after `prepare_of` it

Models = Annotated[
    list[str] | None, Field(min_length=1, description="Names under `models` in params.yaml; all of them if left out.")
]


@flow(name="retrain")
def retrain(
    models: Models = None,
    force: Annotated[bool, Field(description="Run every stage, stale or not.")] = False,
    publish: Annotated[bool, Field(description="Publish the releases.")] = True,
    promote: Annotated[bool, Field(description="Give a version that passed the gate the alias.")] = True,
    to: Annotated[
        str | None, Field(description="Where releases go instead of `publish.to`: a directory or s3://bucket/prefix.")
    ] = None,
    params: str = "params.yaml",
) -> State:
    """Brings every model up to date: stale stages, gate, registered version, published release, alias.

    Several models go side by side, but what trains or draws goes one at a time, under the GPU limit. Ends as Failed
    where a model failed, the others being finished all the same; else as Rejected, Promoted, Registered, Reproduced
    (stages ran and gave an adapter that is known) or UpToDate, whichever of the models' ends comes first in this list.
    Run it in the project's folder.

    Args:
        models: names under `models` in params.yaml; all of them if left out.
        force: run every stage, stale or not.
        publish: publish the releases.
        promote: give a version that passed the gate the alias, and point the channel at its release.
        to: where releases go instead of `publish.to`: a directory or s3://bucket/prefix.
        params: the settings of everything outside DVC; the stages read the params.yaml beside dvc.yaml.
    """
    began = time.monotonic()
    try:
        settings = config.load(Path(params))
        found = [Outcome(model) for model in choose(settings, models)]
    except UserError as error:
        return Failed(message=str(error))
    if to is not None:
        settings = settings.model_copy(update={"publish": settings.publish.model_copy(update={"to": to})})
    workers = concurrent.futures.ThreadPoolExecutor(max_workers=settings.flow.models_at_once)
    # Left in this order: a flow that is told to end first ends the processes that its threads wait for.
    with _saying_where(found), workers, Processes(several=len(found) > 1) as processes:
        work = _prepare(found, settings, force, processes)
        done = []
        for outcome in found:
            if not outcome.errors:
                context = contextvars.copy_context()  # by which Prefect knows whose tasks a thread runs
                task = partial(_bring_up, outcome, settings, work, publish, promote, processes)
                done.append(workers.submit(context.run, task))
        for each in done:
            each.result()
        for outcome in found:
            if outcome.ran:
                with _noting(outcome):
                    model = outcome.model
                    outcome.differing = dvc.differing([prepare_of(model, settings), *stages_of(model, settings)])
        with _noting(*found):
            if dvc.is_shared(work.remote):
                # Also where nothing ran: the last run may have been killed before it came here.
                networked(dvc.push, settings)(processes)

    end = outcomes.end(found)
    total = f"{'nothing was stale, ' if end == 'UpToDate' else ''}{time.monotonic() - began:.0f} s"
    lines = [(outcome.model, *row) for outcome in found for row in outcomes.rows(outcome, settings.gate.steps)]
    outcomes.print_table(lines, total)
    outcomes.leave_artifacts(found, settings, total)
    if end == "Failed":
        return Failed(message="\n".join(f"{o.model}: {error}" for o in found for error in o.errors))
    return Completed(name=end, message=f"{'; '.join(outcome.line for outcome in found)}; {total}")


def prepare_of(model: str, settings: config.Config) -> str:
    """Returns the name of the DVC stage that prepares the model's pictures, which other models may share."""
    return f"prepare-own@{model}" if settings.has_own_data(model) else "prepare"


def stages_of(model: str, settings: config.Config) -> list[str]:
    """Returns the names of the model's own DVC stages in their order, after that which prepares its pictures."""
    names = [f"{stage}@{model}" for stage in STAGES]
    studied = settings.studied(model)
    for kind, name in studied:
        names += [f"{kind}@{model}-{name}", f"{kind}-alone@{model}-{name}"]
    return [*names, *([f"study@{model}"] if studied else []), f"package@{model}"]


@dataclass(frozen=True)
class _Work:
    """What there is to do, as it was found before the models part."""

    due: set[str]  # stages
    force: bool
    remote: str | None  # DVC's default one
    prepared: set[str]  # of the stages that prepare pictures, those that ran: all that follows may be stale

    @property
    def pull(self) -> bool:
        """Whether outputs may be had from the remote instead of computing them."""
        return self.remote is not None


def _prepare(found: list[Outcome], settings: config.Config, force: bool, processes: Processes) -> _Work:
    """Asks what is stale, fetches the bases that need it, and runs the stages that prepare pictures."""
    sharing: dict[str, list[Outcome]] = {}  # by the stage that prepares their pictures
    for outcome in found:
        sharing.setdefault(prepare_of(outcome.model, settings), []).append(outcome)
    names = {outcome.model: stages_of(outcome.model, settings) for outcome in found}
    work = _Work(set(), force, None, set())
    with _noting(*found):
        everything = [*sharing, *(name for own in names.values() for name in own)]
        dvc.resolve(processes)
        due = set(everything) if force else dvc.stale(everything, processes)
        work = _Work(due, force, dvc.default_remote(), set())
    for stage, concerned in sharing.items():
        for outcome in concerned:
            # A base is a dependency and its revision a parameter, so one that is to be fetched anew is among what is
            # due.
            if not outcome.errors and work.due & {stage, *names[outcome.model]}:
                with _noting(outcome):
                    networked(fetch_base, settings)(outcome.model, settings)
    for stage, concerned in sharing.items():
        going = [outcome for outcome in concerned if not outcome.errors]
        with _noting(*going):
            if going and stage in work.due:
                if _run(stage, going, settings, force, work.pull, processes):
                    work.prepared.add(stage)
            else:
                for outcome in going:
                    outcome.fresh.append(stage)
    return work


def _bring_up(
    outcome: Outcome, settings: config.Config, work: _Work, publish: bool, promote: bool, processes: Processes
) -> None:
    """Runs one model's stages, then registers and publishes its release."""
    with _noting(outcome):
        names = stages_of(outcome.model, settings)
        prepared = prepare_of(outcome.model, settings) in work.prepared
        # What follows a stale stage may be stale when its turn comes; what precedes the first one is not.
        first = next((n for n, name in enumerate(names) if name in work.due or prepared), len(names))
        outcome.fresh += names[:first]
        trains = [name for name in names[first:] if dvc.needs_device(name)]
        changed = prepared
        # From the first to the last: of many models one is finished before the next one starts.
        with occupied(settings.flow.limit, processes) if trains else contextlib.nullcontext():
            for name in trains:
                examined = name.startswith("distill@") and _has_gpu(settings.distill_for(outcome.model))
                if examined and (changed or name in work.due):
                    dvc.examine(outcome.model, processes, settings)
                changed = _run(name, [outcome], settings, work.force, work.pull, processes)
        for name in names[first:]:
            if name not in trains:
                _run(name, [outcome], settings, work.force, work.pull, processes)
        _release(outcome, settings, publish, promote, processes)
    get_run_logger().info("%s", outcome.line, extra={"model": outcome.model, "mlflow_run": outcome.run_id})


def _has_gpu(distill: config.Distill) -> bool:
    """Returns whether the model is distilled on a GPU, asked without torch, which takes seconds to import."""
    return distill.device == "cuda" or (distill.device == "auto" and shutil.which("nvidia-smi") is not None)


def _run(
    name: str, outcomes: list[Outcome], settings: config.Config, force: bool, pull: bool, processes: Processes
) -> bool:
    """Runs a stage if DVC finds it stale, writes down what became of it, and returns whether it ran."""
    for outcome in outcomes:
        outcome.at = name
    result = dvc.run_stage(name, processes, settings, force, pull)
    for outcome in outcomes:
        outcome.at = None
        if result.ran:
            outcome.ran.append(result)
        else:
            outcome.fresh.append(name)
    return result.ran


def _release(outcome: Outcome, settings: config.Config, publish: bool, promote: bool, processes: Processes) -> None:
    """Gate, publication, registration, promotion; an unreachable bucket does not keep a version from the registry."""
    model = outcome.model
    outcome.figures = read_metrics(model)
    # Released although the registry is out of reach: nothing is lost, and the next run registers it.
    with _noting(outcome):
        champion = networked(read_champion, settings)(model, outcome.figures, settings, processes)
        outcome.champion = champion.reference if champion else None
        outcome.gate_failures = pass_gate(model, outcome.figures, champion, settings)
    if publish:
        with _noting(outcome):
            outcome.uri = networked(publish_release, settings)(model, settings)
    if outcome.gate_failures is None:
        return
    registered = networked(register_release, settings)(model, settings, outcome.uri, outcome.gate_failures)
    outcome.version, outcome.run_id = f"{registered.name}/{registered.version}", registered.run_id
    outcome.created, outcome.aliases = registered.created, list(registered.aliases)
    alias = settings.registry.alias
    # A version that was promoted before and is not champion now was rolled back by a person.
    if promote and not outcome.gate_failures and not registered.promoted:
        networked(promote_version, settings)(model, registered, settings)
        outcome.promoted = True
        outcome.aliases = sorted({*outcome.aliases, alias})
    if promote and alias in outcome.aliases and outcome.uri:
        networked(point_channel, settings)(model, registered.sha256, settings)


@contextlib.contextmanager
def _saying_where(outcomes: list[Outcome]) -> Iterator[None]:
    """Says, where a person or a signal ends the flow, what it was at and how it goes on."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        stages = ", ".join(dict.fromkeys(outcome.at for outcome in outcomes if outcome.at))
        note(f"ended in {stages or 'no stage'}; the same command goes on there, with all that is done so far")
        raise


@contextlib.contextmanager
def _noting(*outcomes: Outcome) -> Iterator[None]:
    """Writes an error down in these outcomes, so that the other models go on. Interrupts pass."""
    try:
        yield
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else faults.told(error)
        if line is None:
            print(masking.text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        line = line or masking.text(f"{type(error).__name__}: {error}")
        for outcome in outcomes:
            outcome.errors.append(line)
