"""Undocumented parts of MLflow that lcmlora relies on. tests/test_internals.py tests each of them.

A served model's requirements pin the version of MLflow that these parts were tested with.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

VERSION = "3.17"  # that this was written against

Application = Callable[[Any, Any, Any], Awaitable[None]]  # ASGI

SCORING_APPLICATION = "mlflow.pyfunc.scoring_server.app"  # the module in which `mlflow models serve` makes its `app`


def guard_next_application(guard: Callable[[Application], Application]) -> bool:
    """Puts a guard around the application that `mlflow models serve` makes next.

    That module makes its FastAPI application right after it has loaded the model, and offers no hook. So the class
    FastAPI is replaced until that application is made.

    Args:
        guard: returns an application that wraps the given one.

    Returns:
        False where another program loads the model; nothing is replaced then.
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
    """Starts and returns MLflow's monitor, which logs CPU, memory, disk, network and GPU as `system/...` metrics.

    MLflow documents it only for the process's active run, and lcmlora sets none.

    Args:
        seconds: between two measurements.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=tracking_uri)
    monitor.start()
    return monitor


def server_with_passwords() -> Any:
    """Returns the ASGI application of MLflow's server with passwords."""
    from mlflow.server.auth import create_app

    return create_app()
