"""Undocumented parts of Prefect that lcmlora relies on.

tests/test_internals.py and tests/flows/test_outages.py test each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
from prefect.states import State

VERSION = "3.8"  # that this was written against

_LATER = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)
_LONGEST_WAIT = 5.0  # seconds between two tries of a request, instead of up to 2 ** tries
_RENEW_AGAIN = 2.0  # seconds between two tries of renewing a lease
_MOST_LEASES = 10_000


def failure(state: State[Any]) -> BaseException | None:
    """Returns the exception of a failed state in this process, which `State.data` keeps as it was raised."""
    return state.data if isinstance(state.data, BaseException) else None


def server() -> Any:
    """Returns the ASGI application of Prefect's server with its pages."""
    from prefect.server.api.server import create_app

    return create_app(final=True)


def renew_expired_leases(seconds: float) -> None:
    """Renews the slots' leases that have expired. To be called before a server starts, with its settings.

    Nobody could renew them while the server was away, and it takes the slots of expired leases away as soon as it runs.

    Args:
        seconds: for which they hold. Those whose holder has died meanwhile expire after this time.
    """
    from prefect.server.concurrency.lease_storage import get_concurrency_lease_storage

    async def renew() -> None:
        leases = get_concurrency_lease_storage()
        for lease in await leases.read_expired_lease_ids(limit=_MOST_LEASES):
            if await leases.read_lease(lease) is not None:
                await leases.renew_lease(lease, timedelta(seconds=seconds))

    # In a thread of its own: uvicorn makes the application while its event loop runs in this one.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: asyncio.run(renew()),))
    thread.start()
    thread.join()


class Patience:
    """Replaces, while in effect, how long Prefect's clients of this process wait for a server that does not answer.

    Prefect tries a request six times, in a minute, and once if the client has never reached the server. It doubles the
    delay without bound. Its engine ends a run whose lease of the deployment's slot cannot be renewed.
    """

    def __init__(self, seconds: float) -> None:
        self._retries = math.ceil(seconds / _LONGEST_WAIT)

    def value(self) -> int:
        """Returns the number of retries, as Prefect's setting PREFECT_CLIENT_MAX_RETRIES does."""
        from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

        if getattr(_thread, "impatient", False):
            return 0
        return max(self._retries, int(PREFECT_CLIENT_MAX_RETRIES.value()))

    @contextlib.contextmanager
    def in_effect(self) -> Iterator[None]:
        from prefect.client import base
        from prefect.concurrency import _leases

        wait = base.clamped_poisson_interval
        connected = property(lambda client: True, lambda client, value: vars(client).update(_has_connected=value))
        with contextlib.ExitStack() as patches:
            for owner, name, new in (
                (base, "PREFECT_CLIENT_MAX_RETRIES", self),
                (base, "clamped_poisson_interval", lambda average, factor: wait(min(average, _LONGEST_WAIT), factor)),
                (base.PrefectHttpxSyncClient, "_has_connected", connected),
                (base.PrefectHttpxAsyncClient, "_has_connected", connected),
                (_leases, "_renew_concurrency_lease_with_retries", _renew_lease),
            ):
                patches.enter_context(_replaced(owner, name, new))
            yield


def give_up_waiting() -> None:
    """From now on, Prefect's clients of this process try each request once: the process is to end."""
    from prefect.client import base

    base.PREFECT_CLIENT_MAX_RETRIES = SimpleNamespace(value=lambda: 0)


_thread = threading.local()


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Within the block, requests of this thread are tried once, whatever Patience is in effect."""
    _thread.impatient = True
    try:
        yield
    finally:
        _thread.impatient = False


@contextlib.contextmanager
def _replaced(owner: Any, name: str, new: object) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if vars(owner)[name] is new:  # otherwise, `give_up` has replaced it for good
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _renew_lease(client: Any, lease_id: UUID, lease_duration: float, stop_event: threading.Event) -> bool:
    """Renews a lease, however long the server is away. Returns False if there is nothing to renew any more."""
    from prefect.logging import get_logger

    while not stop_event.is_set():
        try:
            with impatient():
                client.renew_concurrency_lease(lease_id=lease_id, lease_duration=lease_duration)
            return True
        except httpx.HTTPStatusError as error:
            if is_gone(error):
                get_logger("concurrency").warning("the server gave a slot of this run to others; the run goes on")
                return False
        except httpx.TransportError:
            pass  # the run's log says that the server is away (see outages.own_state)
        stop_event.wait(_RENEW_AGAIN)
    return False


def is_away(error: httpx.HTTPError) -> bool:
    """Returns whether the server did not answer, or said that it cannot at the moment."""
    if not isinstance(error, httpx.HTTPStatusError):
        return True
    return error.response.is_server_error or error.response.status_code in _LATER


def is_gone(error: httpx.HTTPStatusError) -> bool:
    """Returns whether the server answered that it has no such lease any more."""
    return error.response.status_code == httpx.codes.GONE


def cancel_own_run() -> None:
    """Ends the flow run of this process as its worker would: its processes end, and its state becomes Cancelled."""
    from prefect._internal import control_listener

    control_listener._set_intent("cancel")
    os.environ["PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS"] = "true"  # the engine reports the state
    os.kill(os.getpid(), signal.SIGTERM)


class TemporaryServer:
    """The server that Prefect starts for a flow without one. There is at most one in a process."""

    def status(self) -> int | None:
        """Returns the status with which the server's process has ended, None while it lives or if there is none."""
        own = self._own()
        return own.server_process.poll() if own is not None and own.server_process is not None else None

    def start_again(self) -> None:
        """Starts the server anew at its port, where clients look for it, with the same database."""
        own = self._own()
        if own is not None:
            own.server_process = own._run_uvicorn_command()

    def _own(self) -> Any | None:
        from prefect.server.api.server import SubprocessASGIServer

        return next((each for each in SubprocessASGIServer._instances.values() if each.running), None)


def keep_temporary_server_apart() -> None:
    """Makes Prefect start a run's temporary server in a session of its own. To be called before a flow starts.

    Prefect starts it in the run's own process group, where Ctrl-C in the terminal ends the server before the run. The
    run would then show tracebacks, and try to reach the server for minutes.
    """
    from prefect.server.api import server

    apart = vars(subprocess) | {"Popen": partial(subprocess.Popen, start_new_session=True)}
    server.subprocess = SimpleNamespace(**apart)  # type: ignore[assignment]
