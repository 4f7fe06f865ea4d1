"""Which tasks are tried again, how often, and after how long."""

from __future__ import annotations

from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.client.schemas.objects import TaskRun
from prefect.states import State
from prefect.tasks import exponential_backoff

from lcmlora.config import Config
from lcmlora.errors import Unavailable
from tasks.prefect_internals import failure

P = ParamSpec("P")
R = TypeVar("R")

_JITTER = 0.5  # of the delay, so that models that failed together do not come back together


def networked(task: Task[P, R], settings: Config) -> Task[P, R]:
    """Returns the task so that it is tried again where something outside could not be reached, and only there.

    As `flow.retries` and `flow.retry_seconds` say, the delay doubled each time.
    """
    return task.with_options(
        retries=settings.flow.retries,
        retry_delay_seconds=exponential_backoff(settings.flow.retry_seconds),
        retry_jitter_factor=_JITTER,
        retry_condition_fn=_is_passing,
    )


def _is_passing(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    return isinstance(failure(state), Unavailable | ConnectionError | TimeoutError)
