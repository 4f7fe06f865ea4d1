"""One training or drawing at a time on a GPU: a lock on this machine, and a slot of Prefect's limit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from lcmlora.io.private import runtime_folder, shared_folder
from lcmlora.tasks.machine import gpus
from lcmlora.tasks.machine.locks import Unusable, holding_lock
from lcmlora.tasks.outages.slots import holding_slot
from lcmlora.tasks.output import log_line
from lcmlora.tasks.processes import Processes


@contextlib.contextmanager
def holding_device(limit: str, processes: Processes, count: int = 1, patience: float = 0.0) -> Iterator[None]:
    """Waits until nobody else uses the GPUs, nor holds the limit, and holds both within the block.

    On this machine there is a lock for each GPU, which all users share; where there is no NVIDIA GPU, one for each user
    and limit. The supervisors of the block's commands hold the locks, too, so that after a flow is killed, the next one
    waits until the last of its processes has ended. Between machines, the limit is a slot of the Prefect server's
    concurrency limit of this name. Without a server there is no such slot: a temporary server would never give the slot
    of a killed holder back.

    Args:
        count: of GPUs, the first of those that CUDA_VISIBLE_DEVICES shows.
        patience: seconds to wait for a server that does not answer.

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
        held.enter_context(holding_slot(limit, processes, patience))
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
