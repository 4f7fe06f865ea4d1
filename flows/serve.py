"""Serving the deployments of prefect.yaml from one process, without a work pool and a worker: `lcmlora schedule`.

`python -m flows.serve` does the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora.errors import UserError
from lcmlora.flows.servers import definitions
from lcmlora.flows.verbs import enter, standalone
from lcmlora.io.parsing import JsonObject

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

_PATIENCE = 30 * 86_400.0  # seconds to wait for a server that does not answer, after it has once


def schedule(
    call: typer.Context,
    file: Annotated[
        Path | None,
        typer.Option(help="The file that defines the deployments; the project's prefect.yaml by default."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many runs may go on at the same time.")] = 4,
) -> None:
    """Run the schedules of prefect.yaml from this process until it is interrupted, against a Prefect server.

    PREFECT_API_URL must name the server. `lcmlora up` starts a server, and a worker that does the same work: use one of
    the two.

    Example: PREFECT_API_URL=http://127.0.0.1:4200/api lcmlora schedule
    """
    file = None if file is None else file.absolute()  # before the project's folder becomes the current one
    settings = enter(call).settings()
    if not os.environ.get("PREFECT_API_URL"):
        raise UserError(
            "PREFECT_API_URL is not set: schedules need a server, which `prefect server start` or `lcmlora up` starts; "
            "export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    deployments = read_deployments(file or Path("prefect.yaml"))
    import httpx
    import prefect

    from lcmlora.flows import credentials, provision
    from lcmlora.tasks.prefect_internals import Patience

    api = os.environ["PREFECT_API_URL"]
    try:
        _require_no_pool(deployments)
        provision.provide(settings.flow.limit, pool=None)
        with Patience(_PATIENCE).in_effect():
            prefect.serve(*deployments, limit=limit)
    except httpx.TransportError as error:
        raise UserError(f"the Prefect server at {api} does not answer: {error}") from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.UNAUTHORIZED:
            raise
        raise credentials.missing_password(api) from error


def _require_no_pool(deployments: list[RunnerDeployment]) -> None:
    """Raises UserError if one of them is deployed to a work pool, whose path and pull steps Prefect would keep."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for each in deployments:
            try:
                deployed = client.read_deployment_by_name(f"{each.flow_name}/{each.name}")
            except ObjectNotFound:
                continue
            if deployed.work_pool_name:
                name = f"{each.flow_name}/{each.name}"
                raise UserError(
                    f"{name} is deployed to the work pool {deployed.work_pool_name}, whose workers run it; to serve it "
                    f"instead: `prefect deployment delete {name}`, and so on for the others"
                )


def read_deployments(path: Path) -> list[RunnerDeployment]:
    """Returns the deployments of a prefect.yaml, for runs in the current folder instead of a work pool.

    Raises:
        UserError: the file is missing, or a deployment in it is not valid.
    """
    from lcmlora.flows.servers import checks

    checks.check_deployments(path)
    deployments = []
    for entry in definitions.entries(path):
        try:
            deployments.append(_deployment(entry))
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: {entry.get('entrypoint')}, {entry.get('name')}: {error}") from error
    return deployments


def _deployment(entry: JsonObject) -> RunnerDeployment:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.deployments.runner import RunnerDeployment
    from prefect.events import DeploymentTriggerTypes
    from prefect.schedules import Schedule
    from pydantic import TypeAdapter

    limit = entry.get("concurrency_limit")
    triggers = TypeAdapter(list[DeploymentTriggerTypes])
    return RunnerDeployment.from_entrypoint(
        entry["entrypoint"],
        entry["name"],
        schedules=[Schedule(**each) for each in entry.get("schedules") or []],
        triggers=[*triggers.validate_python(entry.get("triggers") or [])],
        concurrency_limit=ConcurrencyLimitConfig(**limit) if isinstance(limit, dict) else limit,
        parameters=entry.get("parameters"),
        description=entry.get("description"),
        tags=entry.get("tags"),
    )


if __name__ == "__main__":
    standalone("flows.serve", schedule)
