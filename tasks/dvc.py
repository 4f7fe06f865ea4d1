"""DVC stages as Prefect tasks. Each command has a supervisor and ends when the flow ends."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import State

from lcmlora.config import Config, Flow
from lcmlora.dvc_files import resolved
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.parsing import Malformed, as_object, parse_json, parse_yaml, read_yaml
from lcmlora.io.terminal import note, shown
from lcmlora.project import Project
from lcmlora.projects import generated, record
from lcmlora.tasks import dvc_command, dvc_internals
from lcmlora.tasks.devices import holding_lock
from lcmlora.tasks.leftovers import repair
from lcmlora.tasks.output import line_listener
from lcmlora.tasks.prefect_internals import failure
from lcmlora.tasks.processes import Command, Processes, python, reason, script, stream

_RESOLVE = "resolve"  # the stage that writes resolved.yaml
_WITHOUT_DEVICE = ("prepare", "prepare-own", "package")  # stages that neither train nor draw


class StageFailed(UserError):
    """A stage ended with an error. The message has the stage and its last error line.

    Args:
        resumable: the stage was killed or crashed, and may go on from where it was. Otherwise it printed what is wrong.
    """

    def __init__(self, message: str, *, resumable: bool = False) -> None:
        super().__init__(message)
        self.resumable = resumable


class NotPushed(StageFailed, Unavailable):
    """Not everything was sent to the remote."""


@dataclass(frozen=True)
class StageResult:
    """The result of one stage."""

    stage: str
    ran: bool  # False: it was up to date, or its outputs came from DVC's cache
    seconds: float


def run_stage(
    stage: str, processes: Processes, settings: Config, force: bool = False, pull: bool = False
) -> StageResult:
    """Runs one DVC stage if it is stale. A distillation that was killed or crashed is resumed once.

    Args:
        settings: of which `flow` limits the time of a stage.
        force: run it even if it is up to date.
        pull: look for its outputs and for former runs in the default remote before computing them.

    Raises:
        StageFailed: with the stage and the last error line.
    """
    task = repro
    if stage.startswith("distill@"):
        task = repro.with_options(
            retries=1, retry_delay_seconds=settings.flow.retry_seconds, retry_condition_fn=_is_resumable
        )
    return task(stage, processes, settings, force, pull)


def needs_device(stage: str) -> bool:
    """Returns whether the stage trains or draws, so that it must hold the device (tasks.devices)."""
    return stage.partition("@")[0] not in _WITHOUT_DEVICE


def _is_resumable(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    error = failure(state)
    return isinstance(error, StageFailed) and error.resumable


@task(task_run_name="stage {stage}", cache_policy=NO_CACHE)
def repro(stage: str, processes: Processes, settings: Config, force: bool = False, pull: bool = False) -> StageResult:
    """Runs one DVC stage once; see `run_stage`."""
    began = time.monotonic()
    name, _, model = stage.partition("@")
    # DVC does not cache a release: with --pull, it would take its missing files for pulled.
    options = [*(["--force"] if force else []), *(["--pull"] if pull and name != "package" else [])]
    # A killed flow leaves a stage that is ending. DVC would not wait for it, but fail.
    with holding_lock(dvc_internals.TEMPORARY / f"lcmlora-{stage}.lock", stage, processes):
        repair()
        status, lines = _listen(processes, _repro(*options, stage), stage, model or None, settings.flow)
    if status != 0:
        raise _failed(stage, status, lines)
    repair()
    ran = any(dvc_internals.is_run_message(line, stage) for line in lines)
    return StageResult(stage, ran, time.monotonic() - began)


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
    repair()
    status, lines = _listen(processes, _repro(_RESOLVE), _RESOLVE)
    if status != 0:
        raise _failed(_RESOLVE, status, lines)


@task(task_run_name="what is stale", cache_policy=NO_CACHE)
def stale(stages: Sequence[str], processes: Processes) -> set[str]:
    """Returns the stages that are stale now. A stage after one of them may become stale when it has run."""
    answer = _output_of_dvc(processes, ["status", "--json", *stages])
    try:
        return {*as_object(parse_json(answer), "dvc status --json")} & set(stages)
    except Malformed as error:
        raise StageFailed(f"dvc status --json: {error}: {shown(answer)}") from None


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


def is_shared(remote: str | None) -> bool:
    """Returns whether the remote lies outside this repository, so that other machines may read it."""
    return remote is not None and ("://" in remote or not Path(remote).resolve().is_relative_to(Path.cwd()))


@task(task_run_name="push", cache_policy=NO_CACHE)
def push(processes: Processes, jobs: int = 4) -> None:
    """Sends outputs and the run-cache to the default remote, from which other machines then restore results.

    Raises:
        NotPushed: with the last error line. The next push sends what is missing.
    """
    status, lines = _listen(processes, _dvc("push", "--run-cache", "--jobs", str(jobs)), "push")
    if status != 0:
        raise NotPushed(f"dvc push: {reason(lines, status)}")


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
    processes: Processes, command: Command, stage: str, model: str | None = None, flow: Flow | None = None
) -> tuple[int, list[str]]:
    with line_listener(stage, model) as listen:
        try:
            timeout = flow.timeout_hours * 3600 if flow else None
            return stream(processes, command, timeout=timeout, listen=listen, label=stage)
        except TimeoutError:
            assert flow is not None
            raise StageFailed(
                f"{stage}: was ended, as it took longer than {flow.timeout_hours:g} hours (flow.timeout_hours); its "
                "checkpoints are kept, if it writes any"
            ) from None


def _failed(stage: str, status: int, lines: Sequence[str]) -> StageFailed:
    explained = any(line.startswith("error: ") for line in lines)
    return StageFailed(f"{stage}: {reason(lines, status)}", resumable=not explained)


def _repro(*arguments: str) -> Command:
    return script(dvc_command.__file__, "--wait-for-lock", "repro", "--single-item", *arguments)


def _dvc(*arguments: str) -> Command:
    return python("dvc", "--wait-for-lock", *arguments)


def _output_of_dvc(processes: Processes, arguments: Sequence[str]) -> str:
    """Returns the standard output of a short DVC command."""
    repair()
    with processes.start(_dvc(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    if process.returncode != 0:
        why = reason(err.decode(errors="replace").splitlines(), process.returncode)
        raise StageFailed(f"dvc {arguments[0]}: {why}")
    return out.decode()
