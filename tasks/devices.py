"""One training or drawing at a time on a GPU: a lock on this machine, and a slot of Prefect's limit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from lcmlora.errors import Unavailable, UserError
from lcmlora.io.private import runtime_folder, shared_folder
from lcmlora.tasks.machine import gpus
from lcmlora.tasks.machine.locks import Unusable, holding_lock
from lcmlora.tasks.output import Waiting, log_line
from lcmlora.tasks.processes import Processes

_POLL_SERVER = 2.0  # seconds between two tries of a slot
_LEASE = 60.0  # seconds that a slot stays taken after its holder was killed


@contextlib.contextmanager
def holding_device(limit: str, processes: Processes, count: int = 1) -> Iterator[None]:
    """Waits until nobody else uses the GPUs, nor holds the limit, and holds both within the block.

    On this machine there is a lock for each GPU, which all users share; where there is no NVIDIA GPU, one for each user
    and limit. The supervisors of the block's commands hold the locks, too, so that after a flow is killed, the next one
    waits until the last of its processes has ended. Between machines, the limit is a slot of the Prefect server's
    concurrency limit of this name. Without a server there is no such slot: a temporary server would never give the slot
    of a killed holder back.

    Args:
        count: of GPUs, the first of those that CUDA_VISIBLE_DEVICES shows.

    Raises:
        UserError: the server has no such limit.
        Unavailable: the server does not answer.
        Ended: the flow ended while it waited.
    """
    with contextlib.ExitStack() as held:
        found = gpus.used(count)
        for uuid in sorted(found):  # in one order, so that no two wait for each other
            _hold(held, f"GPU {uuid}", f"lcmlora-{_plain(uuid)}.lock", processes)
        if not found:
            path = runtime_folder() / f"{_plain(limit)}.lock"
            held.enter_context(holding_lock(path, limit, processes, exposed=True))
        held.enter_context(_slot(limit, processes))
        yield


def _hold(held: contextlib.ExitStack, name: str, file: str, processes: Processes) -> None:
    """Takes the lock of a GPU: that of all users, or if another user has spoiled its file, that of this user alone."""
    folder = shared_folder()
    if folder is not None:
        try:
            held.enter_context(holding_lock(folder / file, name, processes, shared=True))
            return
        except Unusable as error:
            log_line(f"warning: {error}; other users of {name} are not waited for until that is removed")
    held.enter_context(holding_lock(runtime_folder() / file, name, processes, exposed=True))


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


@contextlib.contextmanager
def _slot(limit: str, processes: Processes) -> Iterator[None]:
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        yield
        return
    with contextlib.ExitStack() as slot:
        waiting = Waiting()
        while not _take(limit, slot):
            waiting.tell(limit, lambda: f"waiting for a slot of Prefect's limit {limit}")
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
