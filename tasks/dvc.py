"""DVC stages as Prefect tasks: each runs in a process group of its own, which ends when the flow ends."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from lcmlora.errors import UserError
from tasks.processes import Command, Processes, python, reason, stream


class StageFailed(UserError):
    """A stage ended with an error; the message is the stage and the last line that says why."""


@dataclass(frozen=True)
class StageResult:
    """What became of one stage."""

    stage: str
    ran: bool  # False: it was up to date, or its outputs came from the cache
    seconds: float


@task(task_run_name="stage {stage}", cache_policy=NO_CACHE)
def run_stage(stage: str, processes: Processes, force: bool = False, pull: bool = False) -> StageResult:
    """Runs one DVC stage if it is stale, its output on standard error.

    Args:
        pull: ask the default remote for outputs and former runs before computing.

    Raises:
        StageFailed: with the stage and the last error line.
    """
    began = time.monotonic()
    options = [*(["--force"] if force else []), *(["--pull"] if pull else [])]
    status, lines = stream(processes, _dvc("repro", "--single-item", *options, stage))
    if status != 0:
        raise StageFailed(f"{stage}: {reason(lines) or f'dvc ended with status {status}'}")
    ran = any(line.startswith(f"Running stage '{stage}'") for line in lines)
    return StageResult(stage, ran, time.monotonic() - began)


@task(task_run_name="what is stale", cache_policy=NO_CACHE)
def stale(stages: Sequence[str], processes: Processes) -> set[str]:
    """Returns those of the stages that DVC would not skip. A stage after one of them may become stale, too."""
    answer = json.loads(_ask(processes, ["status", "--json", *stages]))
    return set(answer) & set(stages)


@task(task_run_name="default remote", cache_policy=NO_CACHE)
def default_remote(processes: Processes) -> str | None:
    """Returns the address of DVC's default remote, None where there is none."""
    listed = _ask(processes, ["config", "--list"]).splitlines()
    settings = dict(line.split("=", 1) for line in listed if "=" in line)
    return settings.get(f"remote.{settings.get('core.remote')}.url")


def is_shared(remote: str | None) -> bool:
    """Returns whether others read this remote: not the one inside this repository."""
    return remote is not None and ("://" in remote or not Path(remote).resolve().is_relative_to(Path.cwd()))


@task(task_run_name="push", cache_policy=NO_CACHE)
def push(processes: Processes, jobs: int = 4) -> None:
    """Sends outputs and the run-cache to the default remote, so that another machine restores instead of computing.

    Raises:
        StageFailed: with the last error line. What was sent stays; the next push sends the rest.
    """
    status, lines = stream(processes, _dvc("push", "--run-cache", "--jobs", str(jobs)))
    if status != 0:
        raise StageFailed(f"dvc push: {reason(lines) or f'ended with status {status}'}")


@task(task_run_name="doctor {model}", cache_policy=NO_CACHE)
def examine(model: str, processes: Processes) -> None:
    """Tries a step of a model's distillation, so that what cannot work fails before hours are spent.

    Raises:
        StageFailed: with the last error line.
    """
    status, lines = stream(processes, python("lcmlora.cli", "doctor", model))
    if status != 0:
        raise StageFailed(f"doctor {model}: {reason(lines) or f'ended with status {status}'}")


def _dvc(*arguments: str) -> Command:
    return python("dvc", "--wait-for-lock", *arguments)


def _ask(processes: Processes, arguments: Sequence[str]) -> str:
    """Returns the standard output of a short DVC command."""
    with processes.start(**_dvc(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    if process.returncode != 0:
        why = reason((out + err).decode(errors="replace").splitlines())
        raise StageFailed(f"dvc {arguments[0]}: {why or f'ended with status {process.returncode}'}")
    return out.decode()
