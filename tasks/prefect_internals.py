"""Undocumented parts of Prefect that lcmlora relies on.

tests/test_internals.py and tests/flows/test_runs.py test each of them.
"""

from __future__ import annotations

import subprocess
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.states import State

VERSION = "3.8"  # that this was written against


def is_limit_taken(error: ConcurrencySlotAcquisitionError) -> bool:
    """Returns whether others hold all slots of a limit: the error's cause is the server's answer, 423."""
    cause = error.__cause__
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == httpx.codes.LOCKED


def is_limit_unknown(error: ConcurrencySlotAcquisitionError) -> bool:
    """Returns whether the server answered that it has no such limit: the error then has no cause."""
    return error.__cause__ is None


def failure(state: State[Any]) -> BaseException | None:
    """Returns the exception of a failed state in this process, which `State.data` keeps as it was raised."""
    return state.data if isinstance(state.data, BaseException) else None


def server() -> Any:
    """Returns the ASGI application of Prefect's server with its pages."""
    from prefect.server.api.server import create_app

    return create_app(final=True)


def keep_temporary_server_apart() -> None:
    """Makes Prefect start a run's temporary server in a session of its own. To be called before a flow starts.

    Prefect starts it in the run's own process group, where Ctrl-C in the terminal ends the server before the run. The
    run would then show tracebacks, and try to reach the server for minutes.
    """
    from prefect.server.api import server

    apart = vars(subprocess) | {"Popen": partial(subprocess.Popen, start_new_session=True)}
    server.subprocess = SimpleNamespace(**apart)  # type: ignore[assignment]
