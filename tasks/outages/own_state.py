"""What a flow run does about its own state on Prefect's server, while it lives.

The server knows of a run what it is told. While it is away, it misses heartbeats, and may take a living run for dead.
A run whose worker has died is cancelled by nobody. So a run looks at its own state, and puts it right.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from lcmlora.tasks import prefect_internals
from lcmlora.tasks.outages.connection import collecting_requests, connection
from lcmlora.tasks.outages.orphans import keeping_output_open
from lcmlora.tasks.output import log_line

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

    from lcmlora.tasks.outages.connection import Request

_LOOK = 10.0  # seconds between two looks
_AGAIN = 2.0  # seconds between two looks while the server is away
_CANCEL = 30.0  # seconds for the worker to end a run that is to be cancelled; it takes ten


class Move(Enum):
    """What a living run does about its state."""

    NOTHING = "nothing"
    REVIVE = "revive"  # becomes Running again
    END = "end"  # ends itself and becomes Cancelled


def move(state: State[Any] | None, cancelling_for: float) -> Move:
    """Returns what a living run does about its state on the server.

    Args:
        cancelling_for: seconds since the state was first seen to be Cancelling.
    """
    if state is None:
        return Move.NOTHING
    if state.is_crashed():
        return Move.REVIVE
    if state.is_cancelled() or (state.is_cancelling() and cancelling_for > _CANCEL):
        return Move.END
    return Move.NOTHING


@contextlib.contextmanager
def outlasting(patience: float) -> Iterator[None]:
    """Within the block, which is a flow's body, the run outlasts that its server is away or that its worker has died.

    What is reported to the server waits for it, and the block ends when the server answers again, or the patience is at
    an end. Outside a flow run, nothing happens.

    Args:
        patience: seconds for which the server may be away.
    """
    from prefect.runtime import deployment, flow_run

    if flow_run.id is None:
        yield
        return
    # The output of a run that a worker has started ends with the worker.
    output = keeping_output_open() if deployment.id is not None else contextlib.nullcontext()
    with (
        prefect_internals.Patience(patience).in_effect(),
        output,
        collecting_requests() as left,
        _Watch(UUID(flow_run.id), patience, left) as watch,
    ):
        try:
            yield
        except Exception:
            watch.settle()
            raise
        except BaseException:  # a person or a signal ends the process
            prefect_internals.give_up_waiting()
            raise
        watch.settle()


class _Watch:
    """A thread that looks at the run's state, and puts it right."""

    def __init__(self, run: UUID, patience: float, left: list[Request]) -> None:
        self._run, self._patience, self._left = run, patience, left
        self._over = threading.Event()
        self._lock = threading.Lock()  # of what follows: the thread and `settle` look
        self._cancelling: float | None = None  # when it was first seen to be Cancelling
        self._away: float | None = None  # since when the server does not answer
        self._gone = False  # the server does not know the run
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._follow,), daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def settle(self) -> None:
        """Waits until the server answers, and puts the state right, before the engine reports the run's end."""
        self._over.set()
        began = time.monotonic()
        with connection() as client:
            while not self.look(client, ending=True) and time.monotonic() - began < self._patience:
                time.sleep(_AGAIN)
        self._say_alive()

    def _follow(self) -> None:
        with connection() as client:
            while not self._over.wait(_LOOK if self._away is None else _AGAIN):
                self.look(client)

    def look(self, client: SyncPrefectClient, ending: bool = False) -> bool:
        """Looks at the state once, and returns whether the server answered.

        Args:
            ending: the run ends by itself, so that nothing need be cancelled.
        """
        import httpx
        from prefect.exceptions import ObjectNotFound

        with self._lock, prefect_internals.impatient():
            if self._gone:
                return True
            try:
                self._put_right(client, ending)
            except ObjectNotFound:
                self._gone = True
                log_line("the Prefect server does not know this run any more; the run goes on without it")
            except httpx.HTTPError as error:
                if prefect_internals.is_away(error):
                    if self._away is None:
                        self._away = time.monotonic()
                        log_line("the Prefect server does not answer; the run goes on, and reports when it is back")
                    return False
                self._gone = True
                log_line(f"the Prefect server refuses to tell this run's state; the run goes on: {error}")
            if self._away is not None:
                log_line(f"the Prefect server is back after {time.monotonic() - self._away:.0f} s")
                self._away = None
                self._say_alive()
            return True

    def _say_alive(self) -> None:
        """Sends a heartbeat at once. Prefect keeps events that it could not send, and sends them with the next one."""
        from prefect.events import emit_event

        emit_event("prefect.flow-run.heartbeat", resource={"prefect.resource.id": f"prefect.flow-run.{self._run}"})

    def _put_right(self, client: SyncPrefectClient, ending: bool) -> None:
        import httpx

        while self._left:
            try:
                self._left[0](client)
            except httpx.HTTPStatusError as error:
                if prefect_internals.is_away(error):
                    raise
                log_line(f"the Prefect server refuses what was left for its return: {error}")
            self._left.pop(0)
        state = client.read_flow_run(self._run).state
        now = time.monotonic()
        self._cancelling = (self._cancelling or now) if state is not None and state.is_cancelling() else None
        todo = move(state, now - (self._cancelling or now))
        if todo is Move.REVIVE:
            from prefect.states import Running

            client.set_flow_run_state(self._run, Running(message="It had been taken for dead, and is alive."))
            log_line(f"the Prefect server took this run for dead ({state.message if state else ''}); it goes on")
        elif todo is Move.END and not ending:
            self._over.set()
            log_line("this run is cancelled, and no worker ends it; it ends itself")
            prefect_internals.cancel_own_run()
