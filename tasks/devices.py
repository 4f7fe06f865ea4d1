"""One training or drawing at a time on a device: a lock on this machine, and a slot of Prefect's limit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lcmlora.errors import Unavailable, UserError
from lcmlora.io.private import runtime_folder
from lcmlora.io.terminal import shown
from lcmlora.tasks.output import log_line
from lcmlora.tasks.processes import Processes

_POLL = 0.2  # seconds between two tries of a lock
_POLL_SERVER = 2.0  # seconds between two tries of a slot
_LEASE = 60.0  # seconds that a slot stays taken after its holder was killed


@contextlib.contextmanager
def holding_device(limit: str, processes: Processes) -> Iterator[None]:
    """Waits until nobody else holds the limit, and holds it within the block.

    On this machine, the limit is a lock. The supervisors of the block's commands hold it, too, so that after a flow is
    killed, the next one waits until the last of its processes has ended. Between machines, it is a slot of the Prefect
    server's concurrency limit of this name. Without a server there is no such slot: a temporary server would never give
    the slot of a killed holder back.

    Raises:
        UserError: the server has no such limit.
        Unavailable: the server does not answer.
        Ended: the flow ended while it waited.
    """
    with holding_lock(_lock_file(limit), limit, processes), _slot(limit, processes):
        yield


@contextlib.contextmanager
def holding_lock(path: Path, name: str, processes: Processes) -> Iterator[None]:
    """Waits for the lock on a file and holds it within the block. Supervisors of the block's commands hold it, too.

    Args:
        name: of the locked thing, for messages.

    Raises:
        UserError: the file cannot be locked.
        Ended: the flow ended while it waited.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UserError(f"{path}: cannot be locked: {error.strerror}") from error
    try:
        if not _try(descriptor):
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            log_line(f"waiting for {name}, held by process {shown(holder) or 'unknown'}")
            while not _try(descriptor):
                processes.pause(_POLL)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        with processes.lending(descriptor):
            yield
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_file(limit: str) -> Path:
    """Returns the lock file of a limit, one for each user of this machine."""
    name = re.sub(r"[^\w.-]", "_", limit)
    return runtime_folder() / f"{name}.lock"


@contextlib.contextmanager
def _slot(limit: str, processes: Processes) -> Iterator[None]:
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        yield
        return
    with contextlib.ExitStack() as slot:
        waiting = False
        while not _take(limit, slot):
            if not waiting:
                log_line(f"waiting for a slot of Prefect's limit {limit}")
            waiting = True
            processes.pause(_POLL_SERVER)
        yield


def _take(limit: str, slot: contextlib.ExitStack) -> bool:
    """Returns whether a slot was free. It is taken then, and leaving `slot` gives it back."""
    from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
    from prefect.concurrency.sync import concurrency

    from lcmlora.tasks.prefect_internals import is_limit_taken, is_limit_unknown

    try:
        # No retries here: Prefect's own wait cannot be interrupted from the flow's thread. A lease that cannot be
        # renewed is no reason to end a training of days.
        acquisition = concurrency(
            limit, max_retries=0, lease_duration=_LEASE, strict=True, raise_on_lease_renewal_failure=False
        )
        slot.enter_context(acquisition)
    except ConcurrencySlotAcquisitionError as error:
        if is_limit_taken(error):
            return False
        if is_limit_unknown(error):
            raise UserError(
                f"the Prefect server has no limit {limit!r}: `prefect gcl create {limit} --limit 1` makes it"
            ) from error
        raise Unavailable(f"no slot of the limit {limit!r}: Prefect's server: {error.__cause__}") from error
    return True
