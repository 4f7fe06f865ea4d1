"""Prefect's worker, made to outlast its server: python -m lcmlora.flows.worker start --pool NAME --name WORKER

It is `prefect worker` with two differences. It waits for a server that is away: Prefect's own gives up after a quarter
of an hour, and ends its runs with it. And with a name, it takes up the runs that a killed worker of this name has left:
at its start, and later those that went on without their worker and died.
"""

from __future__ import annotations

import itertools
import runpy
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from lcmlora.io.terminal import note

_PATIENCE = 30 * 86_400.0  # seconds
_EVERY = 60.0  # seconds between two looks at runs that were left behind
_SETTLED = timedelta(minutes=2)  # after which this worker has started or reported what it took up


def run(arguments: Sequence[str]) -> None:
    """Runs the command line of `prefect`, such as `worker start --pool NAME --name WORKER`."""
    from lcmlora.tasks.prefect_internals import Patience

    with Patience(_PATIENCE).in_effect():
        pool, name = _option(arguments, "--pool", "-p"), _option(arguments, "--name", "-n")
        if pool and name:
            _take_up_runs(pool, name, timedelta(0))
            threading.Thread(target=_look_after_runs, args=(pool, name), name="left runs", daemon=True).start()
        sys.argv = ["prefect", *arguments]
        runpy.run_module("prefect", run_name="__main__", alter_sys=True)


def _look_after_runs(pool: str, name: str) -> None:
    while True:
        time.sleep(_EVERY)
        _take_up_runs(pool, name, _SETTLED)


def _take_up_runs(pool: str, name: str, settled: timedelta) -> None:
    import httpx

    from lcmlora.flows import provision

    try:
        for line in provision.take_up_runs(pool, name, datetime.now(UTC) - settled):
            note(line)
    except httpx.HTTPError as error:  # such as a pool that is deleted; the worker itself says more
        note(f"runs that a killed worker has left are not taken up: {error}")


def _option(arguments: Sequence[str], *spellings: str) -> str | None:
    """Returns the value of an option in a command line, None if it is not given."""
    pairs = itertools.pairwise(arguments)
    return next((value for option, value in pairs if option in spellings), None)


if __name__ == "__main__":
    run(["worker", *sys.argv[1:]])
