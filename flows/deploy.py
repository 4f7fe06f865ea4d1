"""`lcmlora deploy`: the flows of prefect.yaml on a Prefect server that is there already."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lcmlora.errors import UserError
from lcmlora.flows.servers import definitions
from lcmlora.flows.verbs import enter
from lcmlora.io.parsing import JsonObject, as_object, read_json
from lcmlora.io.terminal import say


class Pool(StrEnum):
    """Kinds of work pools."""

    PROCESS = "process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


def deploy(
    call: typer.Context,
    pool: Annotated[Pool, typer.Option(help="The kind of the work pool, where it is made.")] = Pool.PROCESS,
) -> None:
    """Put the flows of prefect.yaml onto the Prefect server that PREFECT_API_URL names.

    What the project lacks there is made: its work pool, the limit of its GPUs, the automation that ends dead runs. `up`
    does the same on the server that it starts. Workers take the runs: python -m
    lcmlora.flows.worker start --pool NAME --name $(hostname). A pool of this name that another project has made is
    refused.

    Examples:

      lcmlora deploy                        for workers that start processes

      lcmlora deploy --pool kubernetes      with the template in deploy/kubernetes
    """
    settings = enter(call).settings()
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        raise UserError("PREFECT_API_URL is not set: it names the server that the flows are put on")
    path = Path("prefect.yaml")
    name, template = definitions.work_pool(path), _template(pool)
    import httpx

    from lcmlora.dvc_files import commits
    from lcmlora.flows import credentials, provision
    from lcmlora.flows.servers import checks, deploying

    checks.check_deployments(path)

    try:
        project = commits.first_of_project(Path())
        provision.provide(settings.flow.limit, pool=name, kind=pool.value, template=template, project=project)
    except httpx.TransportError as error:
        raise UserError(f"the Prefect server at {api} does not answer: {error}") from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.UNAUTHORIZED:
            raise
        raise credentials.missing_password(api) from error
    deploying.deploy_all({name: value for name, value in os.environ.items() if name != "LCMLORA_PROJECT"})
    for flow in sorted(entrypoint for entrypoint, _ in definitions.deployments(path)):
        say(f"deployed {flow}")
    say(f"python -m lcmlora.flows.worker start --pool {name} --name $(hostname)")


def _template(pool: Pool) -> JsonObject | None:
    """Returns the project's job template of a kind of pool; None for processes, which need none."""
    if pool == Pool.PROCESS:
        return None
    path = Path("deploy", pool.value, "base-job-template.json")
    if not path.is_file():
        raise UserError(f"{path}: no such file; `lcmlora init --with {pool.value}` makes a project with it")
    return as_object(read_json(path), str(path))
