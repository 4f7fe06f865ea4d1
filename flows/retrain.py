"""The main flow: runs each model's stale stages, then gate, publishing, registration and promotion.

python -m flows.retrain --help
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and reads its settings
    from lcmlora.flows.command import main

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
from typing import Annotated, Self

from prefect import State, flow, get_run_logger
from prefect.states import Completed, Failed
from pydantic import Field

from lcmlora import config, masking
from lcmlora.dvc_files import commits
from lcmlora.dvc_files.commits import Commit
from lcmlora.errors import Unavailable, UserError
from lcmlora.flows import budgets, choose, outcomes
from lcmlora.flows.notices import rounds
from lcmlora.flows.outcomes import Outcome
from lcmlora.io import faults
from lcmlora.io.files import sha256_file
from lcmlora.io.terminal import note
from lcmlora.registry import tracking
from lcmlora.registry.approval.standing import AWAITING, REFUSED
from lcmlora.tasks import cleaning, costs, dvc
from lcmlora.tasks.champions import expire_approvals, request_approval
from lcmlora.tasks.devices import holding_device
from lcmlora.tasks.models import (
    fetch_base,
    follow_champion,
    pass_gate,
    point_channel,
    promote_version,
    publish_release,
    read_champion,
    read_metrics,
    record_costs,
    register_release,
)
from lcmlora.tasks.outages.own_state import outlasting
from lcmlora.tasks.processes import Processes
from lcmlora.tasks.retrying import networked
from lcmlora.tasks.workspace.remote import Remote

# Of every model, in order, after the one of `prepare_of`; where adapters are polished, `polish` follows `distill`.
STAGES = ("encode", "reference", "distill", "evaluate")

Models = Annotated[list[str] | None, Field(min_length=1)]


@flow(name="retrain")
def retrain_models(
    models: Models = None,
    force: bool = False,
    publish: bool = True,
    promote: bool = True,
    to: str | None = None,
    params: str = "params.yaml",
) -> State:
    """Brings every model up to date: stale stages, gate, published release, registered version, alias.

    Models run side by side, but only one trains or draws at a time, under the GPU limit. If a model fails, the others
    are finished all the same, and the flow ends as Failed. Otherwise it ends as the first of these that one of its
    models ended with: Rejected, OverBudget (costs.budget, in scheduled runs alone), AwaitingApproval (gate.approval),
    Promoted, Registered, Reproduced (stages ran, and gave a registered adapter again), UpToDate; or instead of the last
    four as NotPushed, if DVC's remote did not take the results. Run it in the project's folder.

    Args:
        models: names under `models` in params.yaml; all of them by default.
        force: run every stage, even if it is up to date.
        publish: publish the releases.
        promote: give the alias to a version that passed the gate, and point the channel at its release.
        to: the store of releases, instead of `publish.to`: a directory, s3://bucket/prefix or hf://owner/name.
        params: the settings of everything outside DVC. The stages read the params.yaml beside dvc.yaml.
    """
    began = time.monotonic()
    try:
        settings = config.load(Path(params))
        _check_registry(settings.registry)
        results = [Outcome(model) for model in choose(settings, models)]
    except UserError as error:
        return Failed(message=str(error))
    if to is not None:
        settings = settings.model_copy(update={"publish": settings.publish.model_copy(update={"to": to})})
    with outlasting(settings.flow.patience):
        settled = _Settled.now(Path(params))
        rounds.before_run(settings)
        with cleaning.in_use():
            _run_models(results, settings, force, publish, promote)
        for outcome in results:
            outcome.changed = settled.changes(Path(params))
        return _report(results, settings, time.monotonic() - began)


def _check_registry(settings: config.Registry) -> None:
    """Raises UserError where nothing could be registered. A registry that does not answer now may do so at the end."""
    try:
        tracking.check(settings)
    except Unavailable as error:
        note(f"warning: {error}")


@dataclass(frozen=True)
class _Settled:
    """The settings and the commit that a run begins with. Stages that begin later read what is there then."""

    params: str  # SHA-256 of the file
    git: Commit

    @classmethod
    def now(cls, params: Path) -> Self:
        return cls(sha256_file(params), commits.of_project(Path()))

    def changes(self, params: Path) -> list[str]:
        """Returns what differs now."""
        found, git = [], commits.of_project(Path())
        if not params.is_file() or sha256_file(params) != self.params:
            found.append(f"{params}; gate, registration and publishing went by the former one, later stages by the new")
        if git != self.git:
            found.append(f"the commit, from {self.git.text} to {git.text}")
        return found


def _run_models(results: list[Outcome], settings: config.Config, force: bool, publish: bool, promote: bool) -> None:
    """Runs the shared stages, then all models side by side, then pushes the results to DVC's remote."""
    workers = concurrent.futures.ThreadPoolExecutor(max_workers=settings.flow.models_at_once)
    # The order matters: a flow that must end first ends the processes that its threads wait for.
    with _explaining_interruption(results), workers, Processes(several=len(results) > 1) as processes:
        plan = _prepare(results, settings, force, processes)
        submitted = []
        for outcome in results:
            if not outcome.errors:
                context = contextvars.copy_context()  # tells Prefect the run that a thread's tasks belong to
                task = partial(_bring_up, outcome, settings, plan, publish, promote, processes)
                submitted.append(workers.submit(context.run, task))
        for future in submitted:
            future.result()
        for outcome in results:
            if outcome.ran:
                with _recording_errors(outcome):
                    model = outcome.model
                    outcome.differing = dvc.differing([prepare_of(model, settings), *stages_of(model, settings)])
        for outcome in results:
            outcome.spent = outcome.spent or costs.uncounted_sum(outcome.model, settings)
        with _recording_errors(*results):
            if plan.remote is not None and dvc.is_shared(plan.address):
                # Also when nothing ran: the last run may have been killed before its push.
                _push(results, plan.remote, settings, processes)


def _push(results: list[Outcome], remote: Remote, settings: config.Config, processes: Processes) -> None:
    """Sends the results to DVC's remote. If that fails, no model has failed: the next run sends them."""
    task = dvc.push if remote.fault else networked(dvc.push, settings)
    try:
        task(processes, settings)
    except dvc.NotPushed as error:
        for outcome in results:
            outcome.not_pushed = str(error)
        note(f"{outcomes.NOT_PUSHED}: {error}", "warning: ")


def _report(results: list[Outcome], settings: config.Config, seconds: float) -> State:
    """Prints the table, leaves the artifacts, and returns the flow's end."""
    end = outcomes.end(results)
    total = f"{'nothing was stale, ' if end == 'UpToDate' else ''}{seconds:.0f} s"
    lines = [(outcome.model, *row) for outcome in results for row in outcomes.rows(outcome, settings.gate.steps)]
    outcomes.print_table(lines, total)
    outcomes.leave_artifacts(results, settings, total)
    rounds.after_run(results, settings)
    left = [f"{outcomes.NOT_PUSHED}: {reason}" for reason in dict.fromkeys(o.not_pushed for o in results) if reason]
    if end == "Failed":
        errors = [f"{outcome.model}: {error}" for outcome in results for error in outcome.errors]
        return Failed(message="\n".join([*errors, *left]))
    return Completed(name=end, message="; ".join([*(outcome.line for outcome in results), *left, total]))


def prepare_of(model: str, settings: config.Config) -> str:
    """Returns the name of the DVC stage that prepares the model's pictures. Other models may share it."""
    return f"prepare-own@{model}" if settings.has_own_data(model) else "prepare"


def stages_of(model: str, settings: config.Config) -> list[str]:
    """Returns the names of the model's own DVC stages in their order, without the one that prepares its pictures."""
    polish = ["polish"] if settings.distill_for(model).polish else []
    names = [f"{stage}@{model}" for stage in (*STAGES[:-1], *polish, STAGES[-1])]
    studied = settings.studied(model)
    for kind, name in studied:
        names += [f"{kind}@{model}-{name}", f"{kind}-alone@{model}-{name}"]
    names += [f"study@{model}"] if studied else []
    names += [f"compatibility@{model}"] if settings.compatibility and model in settings.compatibility.models else []
    return [*names, f"package@{model}"]


@dataclass(frozen=True)
class _Plan:
    """The stages to run, before the models run side by side."""

    stale: set[str]  # stages
    force: bool
    address: str | None  # of DVC's default remote
    remote: Remote | None  # the same; outputs can be taken from it instead of being computed
    prepared: set[str]  # stages that prepare pictures and that ran: all that follows them may be stale


def _prepare(results: list[Outcome], settings: config.Config, force: bool, processes: Processes) -> _Plan:
    """Finds the stale stages, fetches the bases that they need, and runs the stages that prepare pictures."""
    sharing: dict[str, list[Outcome]] = {}  # by the stage that prepares their pictures
    for outcome in results:
        sharing.setdefault(prepare_of(outcome.model, settings), []).append(outcome)
    names = {outcome.model: stages_of(outcome.model, settings) for outcome in results}
    plan = _Plan(set(), force, None, None, set())
    with _recording_errors(*results):
        everything = [*sharing, *(name for own in names.values() for name in own)]
        dvc.resolve(processes)
        stale = set(everything) if force else dvc.stale(everything, processes)
        address = dvc.default_remote()
        plan = _Plan(stale, force, address, Remote(address) if address else None, set())
    for stage, concerned in sharing.items():
        for outcome in concerned:
            # DVC knows bases as dependencies and their revisions as parameters, so a new base makes a stage stale.
            if not outcome.errors and plan.stale & {stage, *names[outcome.model]}:
                with _recording_errors(outcome):
                    networked(fetch_base, settings)(outcome.model, settings)
    for stage, concerned in sharing.items():
        going = [outcome for outcome in concerned if not outcome.errors]
        with _recording_errors(*going):
            if going and stage in plan.stale:
                if _run(stage, going, settings, force, plan.remote, processes):
                    plan.prepared.add(stage)
            else:
                for outcome in going:
                    outcome.up_to_date.append(stage)
    return plan


def _bring_up(
    outcome: Outcome, settings: config.Config, plan: _Plan, publish: bool, promote: bool, processes: Processes
) -> None:
    """Runs one model's stages, then publishes, registers and promotes its release."""
    with _recording_errors(outcome):
        names = stages_of(outcome.model, settings)
        prepared = prepare_of(outcome.model, settings) in plan.prepared
        # Stages before the first stale one are up to date. Those after it may become stale.
        first = next((n for n, name in enumerate(names) if name in plan.stale or prepared), len(names))
        outcome.up_to_date += names[:first]
        on_device = [name for name in names[first:] if dvc.needs_device(name)]
        if on_device and budgets.leave_to_a_person(outcome, settings):
            return
        changed = prepared
        # Held for all of a model's stages, so that one model is finished before the next one starts.
        gpus, patience = settings.launch_for(outcome.model).processes, settings.flow.patience
        device = holding_device(settings.flow.limit, processes, gpus, patience)
        with device if on_device else contextlib.nullcontext():
            for name in on_device:
                examined = name.startswith("distill@") and _has_gpu(settings.distill_for(outcome.model))
                if examined and (changed or name in plan.stale):
                    dvc.run_doctor(outcome.model, processes, settings)
                changed = _run(name, [outcome], settings, plan.force, plan.remote, processes)
        for name in names[first:]:
            if name not in on_device:
                _run(name, [outcome], settings, plan.force, plan.remote, processes)
        _release(outcome, settings, publish, promote, processes)
    get_run_logger().info("%s", outcome.line, extra={"model": outcome.model, "mlflow_run": outcome.run_id})


def _has_gpu(distill: config.Distill) -> bool:
    """Returns whether the model is distilled on a GPU. It does not ask torch, which takes seconds to import."""
    return distill.device == "cuda" or (distill.device == "auto" and shutil.which("nvidia-smi") is not None)


def _run(
    name: str,
    outcomes: list[Outcome],
    settings: config.Config,
    force: bool,
    remote: Remote | None,
    processes: Processes,
) -> bool:
    """Runs a stage if it is stale, records its result in the outcomes, and returns whether it ran."""
    for outcome in outcomes:
        outcome.running = name
    result = dvc.run_stage(name, processes, settings, force, remote)
    for outcome in outcomes:
        outcome.running = None
        if result.ran:
            outcome.ran.append(result)
        else:
            outcome.up_to_date.append(name)
    return result.ran


def _release(outcome: Outcome, settings: config.Config, publish: bool, promote: bool, processes: Processes) -> None:
    """Runs the gate, and publishes, registers and promotes the release.

    If the store cannot be reached, the version is registered all the same. If the registry cannot be reached, the
    release is published, and the next run registers it.
    """
    model = outcome.model
    outcome.figures = read_metrics(model)
    with _recording_errors(outcome):
        champion = networked(read_champion, settings)(model, outcome.figures, settings, processes)
        outcome.champion = champion.reference if champion else None
        outcome.gate_failures = pass_gate(model, outcome.figures, champion, settings)
    # A store that fails does not keep the release from the others.
    for store in settings.publish.stores if publish else ():
        outcome.uris.append(None)
        with _recording_errors(outcome):
            outcome.uris[-1] = networked(publish_release, settings)(model, settings, store)
    if outcome.gate_failures is None:
        return
    if settings.gate.needs_approval(model):
        networked(expire_approvals, settings)(model, settings)
    registered = networked(register_release, settings)(model, settings, outcome.uris, outcome.gate_failures)
    outcome.version, outcome.run_id = f"{registered.name}/{registered.version}", registered.run_id
    outcome.deleted = registered.deleted
    outcome.created, outcome.aliases = registered.created, list(registered.aliases)
    outcome.spent = networked(record_costs, settings)(model, registered, settings)
    alias, outcome.approval = settings.registry.alias, registered.approval
    # A person has rolled back a version that was promoted before and is not champion now.
    if promote and not outcome.gate_failures and not registered.promoted and _may_become_champion(outcome, settings):
        networked(promote_version, settings)(model, registered, settings)
        outcome.promoted = True
        outcome.aliases = sorted({*outcome.aliases, alias})
    elif outcome.awaiting:
        asked = networked(request_approval, settings)(model, registered, settings)
        outcome.asked, outcome.approval = asked is not None, asked or outcome.approval
    for store, uri in zip(settings.publish.stores, outcome.uris, strict=False):
        if promote and uri:
            with _recording_errors(outcome):
                if alias in outcome.aliases:
                    networked(point_channel, settings)(model, registered.sha256, settings, store)
                else:
                    networked(follow_champion, settings)(model, settings, store)


def _may_become_champion(outcome: Outcome, settings: config.Config) -> bool:
    """Returns whether a version that passed the gate may become champion now: a person may have to approve it first.

    The run does not wait for the person: it would hold a worker for days. It ends, and approving promotes the version.
    """
    state = outcome.approval.state if outcome.approval else None
    outcome.awaiting = settings.gate.needs_approval(outcome.model) and state in (None, AWAITING, "superseded")
    return not outcome.awaiting and state not in REFUSED


@contextlib.contextmanager
def _explaining_interruption(outcomes: list[Outcome]) -> Iterator[None]:
    """If a person or a signal ends the flow, prints the stage that it was in and how to go on."""
    try:
        yield
    except Exception:
        raise
    except BaseException:  # of SIGTERM Prefect makes a TerminationSignal
        stages = ", ".join(dict.fromkeys(outcome.running for outcome in outcomes if outcome.running))
        note(f"ended in {stages or 'no stage'}; the same command goes on from there and keeps all results so far")
        raise


@contextlib.contextmanager
def _recording_errors(*outcomes: Outcome) -> Iterator[None]:
    """Records an error in these outcomes, so that the other models go on. Interrupts are not caught."""
    try:
        yield
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else faults.explain(error)
        if line is None:
            print(masking.text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        line = line or masking.text(f"{type(error).__name__}: {error}")
        for outcome in outcomes:
            outcome.errors.append(line)
