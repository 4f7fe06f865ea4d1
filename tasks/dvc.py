"""DVC stages as Prefect tasks. Each command has a supervisor and ends when the flow ends."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.states import State

from lcmlora.config import Config, Flow
from lcmlora.dvc_files import resolved
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.parsing import Malformed, as_object, parse_json, parse_yaml, read_yaml
from lcmlora.io.terminal import note, shown
from lcmlora.project import Project
from lcmlora.projects import generated, record
from lcmlora.tasks import costs, dvc_command, dvc_internals
from lcmlora.tasks.costs import Metered
from lcmlora.tasks.leftovers import repair
from lcmlora.tasks.machine.locks import holding_lock
from lcmlora.tasks.output import Waiting, line_listener, run_logger
from lcmlora.tasks.prefect_internals import failure
from lcmlora.tasks.processes import Command, Processes, python, reason, script, stream
from lcmlora.tasks.workspace import activity
from lcmlora.tasks.workspace import look as look_command
from lcmlora.tasks.workspace.remote import Pull, Remote, ask, push_fault
from lcmlora.tasks.workspace.state import Workspace

_RESOLVE = "resolve"  # the stage that writes resolved.yaml
_POLL = 1.0  # seconds between two looks at what another DVC does
_WITHOUT_DEVICE = ("prepare", "prepare-own", "package")  # stages that neither train nor draw


class StageFailed(UserError):
    """A stage ended with an error. The message has the stage and its last error line.

    Args:
        resumable: the stage was killed or crashed, and may go on from where it was. Otherwise it printed what is wrong.
    """

    def __init__(self, message: str, *, resumable: bool = False) -> None:
        super().__init__(message)
        self.resumable = resumable


class NotPushed(StageFailed):
    """Not everything was sent to the remote. The next push sends what is missing."""


class RemoteUnavailable(NotPushed, Unavailable):
    """The remote failed, and the same push may succeed soon."""


@dataclass(frozen=True)
class StageResult:
    """The result of one stage."""

    stage: str
    ran: bool  # False: it was up to date, or its outputs came from DVC's cache
    seconds: float


def run_stage(
    stage: str, processes: Processes, settings: Config, force: bool = False, remote: Remote | None = None
) -> StageResult:
    """Runs one DVC stage if it is stale. A distillation that was killed or crashed is resumed once.

    If another run works on the stage in this folder, it waits and says for what.

    Args:
        settings: of which `flow` limits the time of a stage.
        force: run it even if it is up to date.
        remote: look for its outputs and for former runs there before computing them. If it fails, they are computed.

    Raises:
        StageFailed: with the stage and the last error line.
    """
    task = repro
    if stage.startswith(("distill@", "polish@")):
        task = repro.with_options(
            retries=1, retry_delay_seconds=settings.flow.retry_seconds, retry_condition_fn=_is_resumable
        )
    return task(stage, processes, settings, force, remote)


def needs_device(stage: str) -> bool:
    """Returns whether the stage trains or draws, so that it must hold the device (tasks.devices)."""
    return stage.partition("@")[0] not in _WITHOUT_DEVICE


def _is_resumable(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    error = failure(state)
    return isinstance(error, StageFailed) and error.resumable


@task(task_run_name="stage {stage}", cache_policy=NO_CACHE)
def repro(
    stage: str, processes: Processes, settings: Config, force: bool = False, remote: Remote | None = None
) -> StageResult:
    """Runs one DVC stage once; see `run_stage`."""
    began = time.monotonic()
    options = ["--force"] if force else []
    # A killed flow leaves a stage that is ending. DVC would not wait for it, but fail.
    with (
        holding_lock(dvc_internals.TEMPORARY / f"lcmlora-{stage}.lock", stage, processes),
        costs.metering(stage, settings) if needs_device(stage) else contextlib.nullcontext(Metered()) as metered,
    ):
        done = _pulled(stage, processes, settings.flow, options, remote)
        status, lines = done or _listen(processes, _repro(*options, stage), stage, _model(stage), settings.flow)
        metered.used = ran = any(dvc_internals.is_run_message(line, stage) for line in lines)
    if status != 0:
        raise _failed(stage, status, lines)
    repair()
    return StageResult(stage, ran, time.monotonic() - began)


def _pulled(
    stage: str, processes: Processes, flow: Flow, options: Sequence[str], remote: Remote | None
) -> tuple[int, list[str]] | None:
    """Runs a stage with what the remote has of it and returns status and lines.

    None if that is to be done without the remote: there is none, or it failed before the stage's command began.
    """
    # DVC does not cache a release: with --pull, it would take its missing files for pulled.
    if remote is None or stage.startswith("package@") or not remote.answers(processes):
        return None
    pull = Pull(stage, flow.pull_minutes, remote)
    command = _repro(*options, "--pull", stage)
    try:
        status, lines = _listen(processes, command, stage, _model(stage), flow, pull)
    except TimeoutError:
        remote.give_up(f"{stage} waited for longer than {flow.pull_minutes:g} minutes (flow.pull_minutes)")
        return None
    if status == 0 or pull.begun:
        return status, lines
    fault = reason(lines, status)
    status, lines = _listen(processes, _repro(*options, stage), stage, _model(stage), flow)
    if status == 0 or reason(lines, status) != fault:
        remote.give_up(fault)  # without the remote it went otherwise, so that the remote was the reason
    return status, lines


def _model(stage: str) -> str | None:
    return stage.partition("@")[2] or None


@task(task_run_name="resolve settings", cache_policy=NO_CACHE)
def resolve(processes: Processes) -> None:
    """Brings resolved.yaml up to date, by which DVC sees what params.yaml and this package have changed.

    It also updates dvc.yaml if a model has gained or lost data of its own. To be called before DVC is asked what is
    stale. A project whose dvc.yaml has no such stage is left as it is. If its files are of another version of lcmlora,
    it says so.

    Raises:
        UserError: params.yaml, dvc.yaml or the record of generated files cannot be read, or the stage failed.
    """
    project = Project()
    if advice := record.advice(project.root):
        note(advice, "warning: ")
    stages = as_object(read_yaml(project.dvc_yaml), str(project.dvc_yaml)).get("stages")
    if not isinstance(stages, dict) or _RESOLVE not in stages:
        return
    settings = project.settings()
    if generated.refresh_dvc_yaml(settings, project):
        note(f"{project.dvc_yaml}: the stages that read pictures are updated")
    if resolved.is_current(settings, project.resolved):
        return
    status, lines = _listen(processes, _repro(_RESOLVE), _RESOLVE)
    if status != 0:
        raise _failed(_RESOLVE, status, lines)


@task(task_run_name="what is stale", cache_policy=NO_CACHE)
def stale(stages: Sequence[str], processes: Processes) -> set[str]:
    """Returns the stages that are stale now. A stage after one of them may become stale when it has run.

    A stage whose files another process writes at the moment counts as stale: only its end tells.
    """
    found = look(stages, processes)
    if (logger := run_logger()) is not None:
        for stage, reasons in found.reasons.items():
            logger.info("%s is stale: %s", stage, "; ".join(reasons))
    return {*found.reasons, *found.blocked}


def look(stages: Sequence[str], processes: Processes, settings: Config | None = None) -> Workspace:
    """Returns which stages are stale, why, and what runs. It changes nothing, waits for no other DVC and disturbs none.

    Args:
        settings: to be compared with the stages' last runs, instead of what resolved.yaml has.

    Raises:
        StageFailed: DVC cannot read the project.
        UserError: two names would share one entry of resolved.yaml.
    """
    repair()
    with tempfile.TemporaryDirectory(prefix="lcmlora-") as folder:
        text = ""
        if settings is not None and Project().resolved.is_file():
            text = str(Path(folder, Project().resolved.name))
            Path(text).write_text(resolved.text(settings), encoding="utf-8")
        command = script(look_command.__file__, text, *stages)
        with processes.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate()
    if process.returncode != 0:
        why = reason(err.decode(errors="replace").splitlines(), process.returncode)
        raise StageFailed(f"dvc status: {why}")
    try:
        return Workspace.of(parse_json(out))
    except (Malformed, UserError, KeyError, TypeError) as error:
        raise StageFailed(f"dvc status: {error}: {shown(out.decode(errors='replace'))}") from None


def differing(stages: Sequence[str]) -> list[str] | None:
    """Returns the stages whose entry in dvc.lock differs from the one in Git's last commit.

    None if there is no commit, or no dvc.lock in it, or no Git.

    Raises:
        UserError: a dvc.lock cannot be read.
    """
    if shutil.which("git") is None:
        return None
    committed = subprocess.run(["git", "show", "HEAD:./dvc.lock"], capture_output=True)
    if committed.returncode != 0:
        return None
    try:
        old = as_object(parse_yaml(committed.stdout), "dvc.lock")
    except Malformed as error:
        raise UserError(f"dvc.lock of Git's last commit: {error}") from None
    repair()  # waits for a DVC that is writing it
    new = as_object(read_yaml(Project().dvc_lock), "dvc.lock")
    new_stages, old_stages = (as_object(lock.get("stages", {}), "dvc.lock: stages") for lock in (new, old))
    return [stage for stage in stages if new_stages.get(stage) != old_stages.get(stage)]


def default_remote() -> str | None:
    """Returns the address of DVC's default remote, None where there is none.

    Raises:
        StageFailed: DVC's settings cannot be read.
    """
    try:
        return dvc_internals.default_remote()
    except ValueError as error:
        raise StageFailed(f"dvc config: {error}") from error


def is_cache_shared() -> bool:
    """Returns whether DVC's cache lies outside this repository, so that other projects may keep their results there.

    Raises:
        StageFailed: DVC's settings cannot be read.
    """
    try:
        return not dvc_internals.cache_folder().resolve().is_relative_to(Path.cwd().resolve())
    except ValueError as error:
        raise StageFailed(f"dvc config: {error}") from error


def is_shared(remote: str | None) -> bool:
    """Returns whether the remote lies outside this repository, so that other machines may read it."""
    return remote is not None and ("://" in remote or not Path(remote).resolve().is_relative_to(Path.cwd()))


@task(task_run_name="push", cache_policy=NO_CACHE)
def push(processes: Processes, settings: Config, jobs: int = 4) -> None:
    """Sends outputs and the run-cache to the default remote, from which other machines then restore results.

    Args:
        settings: of which `flow.push_minutes` limits the time; the rest is left to the next push.

    Raises:
        NotPushed: with the reason; RemoteUnavailable where the same push may succeed soon.
    """
    if fault := ask(processes):
        raise RemoteUnavailable(f"dvc push: {fault}")
    command, minutes = _dvc("push", "--run-cache", "--jobs", str(jobs)), settings.flow.push_minutes
    try:
        status, lines = _listen(processes, command, "push", flow=Flow(timeout_hours=minutes / 60))
    except StageFailed:
        raise NotPushed(
            f"dvc push: was ended, as it took longer than {minutes:g} minutes (flow.push_minutes); what was sent stays"
        ) from None
    if fault := push_fault(lines, status):
        raise RemoteUnavailable(f"dvc push: {fault}")


@task(task_run_name="doctor {model}", cache_policy=NO_CACHE)
def run_doctor(model: str, processes: Processes, settings: Config) -> None:
    """Tries a step of a model's distillation, so that a mistake is found before hours are spent.

    The caller must hold the device.

    Raises:
        StageFailed: with the last error line.
    """
    status, lines = _listen(processes, python("lcmlora", "doctor", model), "doctor", model, settings.flow)
    if status != 0:
        raise _failed(f"doctor {model}", status, lines)


def _listen(
    processes: Processes,
    command: Command,
    stage: str,
    model: str | None = None,
    flow: Flow | None = None,
    pull: Pull | None = None,
) -> tuple[int, list[str]]:
    """Runs a command and returns its status and important lines. If it is a DVC that cannot begin because another
    process works on the same paths, it waits, says for what, and tries again.

    Raises:
        StageFailed: it took longer than `flow.timeout_hours`.
        TimeoutError: the pull is late.
    """
    waiting = Waiting()
    while True:
        repair()
        status, lines = _stream(processes, command, stage, model, flow, pull)
        if status != dvc_command.BUSY:
            return status, lines
        blockers = dvc_command.blockers(lines)
        busy = _entries_of(blockers)
        _tell(waiting, stage, blockers)
        processes.pause(_POLL)
        while busy and _entries_of(blockers) == busy:
            _tell(waiting, stage, blockers)
            processes.pause(_POLL)


def _tell(waiting: Waiting, stage: str, blockers: list[int]) -> None:
    waiting.tell(
        blockers, lambda: f"{stage} waits for {' and '.join(map(activity.describe, blockers)) or 'another DVC'}"
    )


def _entries_of(pids: Sequence[int]) -> set[activity.Entry]:
    return {entry for entry in activity.entries() if entry.pid in pids}


def _stream(
    processes: Processes, command: Command, stage: str, model: str | None, flow: Flow | None, pull: Pull | None
) -> tuple[int, list[str]]:
    timeout = flow.timeout_hours * 3600 if flow else None
    with line_listener(stage, model) as listen:
        listeners = [each for each in (listen, pull.listen if pull else None) if each]

        def hear(line: str) -> None:
            for each in listeners:
                each(line)

        if pull:
            pull.start()
        expired = (lambda: pull.is_late) if pull else None
        try:
            return stream(processes, command, timeout=timeout, listen=hear, label=stage, expired=expired)
        except TimeoutError:
            if flow is None or (pull and pull.is_late):
                raise
            raise StageFailed(
                f"{stage}: was ended, as it took longer than {flow.timeout_hours:g} hours (flow.timeout_hours); its "
                "checkpoints are kept, if it writes any"
            ) from None


def _failed(stage: str, status: int, lines: Sequence[str]) -> StageFailed:
    explained = any(line.startswith("error: ") for line in lines)
    return StageFailed(f"{stage}: {reason(lines, status)}", resumable=not explained)


def _repro(*arguments: str) -> Command:
    return _dvc("repro", "--single-item", *arguments)


def _dvc(*arguments: str) -> Command:
    command = script(dvc_command.__file__, "--wait-for-lock", *arguments)
    run = flow_run.get_name()
    return replace(command, environment={**(command.environment or {}), activity.RUN: run}) if run else command
