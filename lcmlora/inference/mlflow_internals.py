"""Undocumented parts of MLflow that lcmlora relies on. tests/test_internals.py tries each.

A model's requirements pin MLflow's version, so that it is served by the one that this was tested with.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

VERSION = "3.17"  # that this was written against

Application = Callable[[Any, Any, Any], Awaitable[None]]  # ASGI

SCORING_APPLICATION = "mlflow.pyfunc.scoring_server.app"  # the module in which `mlflow models serve` makes its `app`


def guard_next_application(guard: Callable[[Application], Application]) -> bool:
    """Has the application that `mlflow models serve` makes next run behind a guard.

    That module makes its application right after it has loaded the model, as a FastAPI, and offers no hook. So
    FastAPI is replaced until it is made.

    Args:
        guard: makes one application of another.

    Returns:
        False where the model is loaded by another program: nothing is replaced.
    """
    module = sys.modules.get(SCORING_APPLICATION)
    if module is None or hasattr(module, "app"):
        return False
    import fastapi

    plain = fastapi.FastAPI

    class Guarded(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            fastapi.FastAPI = plain  # type: ignore[misc]  # this application and no other
            super().__init__(*arguments, **settings)
            self._guarded = guard(super().__call__)

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self._guarded(scope, receive, send)

    fastapi.FastAPI = Guarded  # type: ignore[misc]
    return True


def start_system_monitor(run_id: str, tracking_uri: str, seconds: float) -> Any:
    """Returns MLflow's own monitor, started: CPU, memory, disk, network and GPU as `system/...` metrics of the run.

    MLflow's documented way starts it for the active run of the process alone, and lcmlora has none.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=tracking_uri)
    monitor.start()
    return monitor


def server_with_passwords() -> Any:
    """Returns the ASGI application of MLflow's server with passwords."""
    from mlflow.server.auth import create_app

    return create_app()
