"""Retrying tasks that could not reach a server."""

from __future__ import annotations

from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.client.schemas.objects import TaskRun
from prefect.states import State
from prefect.tasks import exponential_backoff

from lcmlora.config import Config
from lcmlora.errors import Unavailable
from lcmlora.tasks.prefect_internals import failure

P = ParamSpec("P")
R = TypeVar("R")

_JITTER = 0.5  # share of the delay, so that models that failed together do not retry together


def networked(task: Task[P, R], settings: Config) -> Task[P, R]:
    """Returns the task with retries for the case that a server or store could not be reached.

    `flow.retries` and `flow.retry_seconds` set their number and delay; the delay doubles each time.
    """
    return task.with_options(
        retries=settings.flow.retries,
        retry_delay_seconds=exponential_backoff(settings.flow.retry_seconds),
        retry_jitter_factor=_JITTER,
        retry_condition_fn=_is_temporary,
    )


def _is_temporary(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    return isinstance(failure(state), Unavailable | ConnectionError | TimeoutError)
