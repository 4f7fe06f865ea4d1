"""A slot of a limit on Prefect's server that stays with a living holder, even if the server is away for a while."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID

from lcmlora.errors import Unavailable, UserError
from lcmlora.tasks.outages.connection import connection, leave_to_run
from lcmlora.tasks.output import Waiting, log_line
from lcmlora.tasks.processes import Processes

if TYPE_CHECKING:
    import httpx
    from prefect.client.orchestration import SyncPrefectClient

LEASE = 60.0  # seconds that a slot stays taken after its holder was killed; Prefect allows no less
_RENEW = 15.0  # seconds between two renewals
_AGAIN = 2.0  # seconds between two tries


@contextlib.contextmanager
def holding_slot(limit: str, processes: Processes, patience: float) -> Iterator[None]:
    """Waits for a slot of the limit, and holds it within the block. Without a server there is no such slot.

    The server takes a slot away whose lease was not renewed, as when it was away for long. It is taken again then, as
    soon as one is free; the block goes on meanwhile.

    Args:
        patience: seconds to wait for a server that does not answer.

    Raises:
        UserError: the server has no such limit, or refuses.
        Unavailable: the server does not answer.
        Ended: the flow ended while it waited.
    """
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        yield
        return
    with connection() as client:
        slot = Slot(limit, client)
        _wait_for(slot, processes, patience)
        over = threading.Event()
        # It writes to the log of this run.
        keeper = threading.Thread(target=contextvars.copy_context().run, args=(slot.keep, over.wait), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
            slot.give_back()


def _wait_for(slot: Slot, processes: Processes, patience: float) -> None:
    import httpx

    from lcmlora.tasks import prefect_internals

    waiting = Waiting()
    away: float | None = None
    while True:
        try:
            if slot.take():
                return
            away = None
            waiting.tell("slot", lambda: f"waiting for a slot of Prefect's limit {slot.limit}")
        except httpx.HTTPError as error:
            if not prefect_internals.is_away(error):
                raise UserError(f"no slot of the limit {slot.limit!r}: Prefect's server: {error}") from error
            away = away or time.monotonic()
            if time.monotonic() - away > patience:
                raise Unavailable(f"no slot of the limit {slot.limit!r}: Prefect's server: {error}") from error
            waiting.tell(
                "server", lambda: f"waiting for Prefect's server, which does not answer, for a slot of {slot.limit}"
            )
        processes.pause(_AGAIN)


class Slot:
    """A slot of a limit: taking it, keeping it, and giving it back.

    Attributes:
        lease: the lease on the slot; None while the slot is not held.
    """

    def __init__(self, limit: str, client: SyncPrefectClient) -> None:
        self.limit = limit
        self.lease: UUID | None = None
        self._client = client

    def take(self) -> bool:
        """Returns whether a slot was free, which is held then.

        Raises:
            UserError: the server has no such limit.
            httpx.HTTPError: the server does not answer, or answers with an error.
        """
        import httpx

        try:
            answer = _once(
                self._client.increment_concurrency_slots_with_lease,
                names=[self.limit],
                slots=1,
                mode="concurrency",
                lease_duration=LEASE,
                holder=_holder(),
            ).json()
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return False
            raise
        if not answer["limits"]:
            raise UserError(
                f"the Prefect server has no limit {self.limit!r}: `prefect gcl create {self.limit} --limit 1` makes it"
            )
        self.lease = UUID(answer["lease_id"])
        return True

    def keep(self, wait: Callable[[float], bool]) -> None:
        """Renews the lease until `wait`, which waits for so many seconds, returns True."""
        pause = _RENEW
        while not wait(pause):
            pause = _RENEW if self.renew() else _AGAIN

    def renew(self) -> bool:
        """Returns whether the slot is held for another minute. If the server has taken it away, it is taken again."""
        import httpx

        from lcmlora.tasks import prefect_internals

        try:
            if self.lease is None:
                return self._take_again()
            _once(self._client.renew_concurrency_lease, lease_id=self.lease, lease_duration=LEASE)
            return True
        except httpx.HTTPStatusError as error:
            if not prefect_internals.is_gone(error):
                return False
        except httpx.TransportError:
            return False  # the server is away, which the run's log says (see own_state); it will be tried again
        self.lease = None
        log_line(f"Prefect's server has given the slot of {self.limit} away while it did not hear from this run")
        return False

    def _take_again(self) -> bool:
        try:
            taken = self.take()
        except UserError as error:  # the limit was deleted, or the server's database is another one
            log_line(f"{error}; this run goes on without a slot")
            return True
        if taken:
            log_line(f"the slot of {self.limit} was taken again")
        return taken

    def give_back(self) -> None:
        """Gives the slot back. If the server is away, the run does so when it is back, or the lease ends."""
        import httpx

        if self.lease is None:
            return
        lease, self.lease = self.lease, None
        try:
            _once(self._client.release_concurrency_slots_with_lease, lease_id=lease)
        except httpx.HTTPError as error:
            if not leave_to_run(lambda client: client.release_concurrency_slots_with_lease(lease)):
                log_line(f"the slot of {self.limit} becomes free {LEASE:.0f} s after Prefect's server is back: {error}")


def _once(request: Callable[..., httpx.Response], **arguments: Any) -> httpx.Response:
    """Sends a request without Prefect's retries, which cannot be interrupted."""
    from lcmlora.tasks import prefect_internals

    with prefect_internals.impatient():
        return request(**arguments)


def _holder() -> Any:
    """Returns the present flow run as Prefect's pages show who holds a slot, None outside a run."""
    from prefect.client.schemas.objects import ConcurrencyLeaseHolder
    from prefect.runtime import flow_run

    return ConcurrencyLeaseHolder(type="flow_run", id=UUID(flow_run.id)) if flow_run.id else None
