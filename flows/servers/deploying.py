"""Putting the deployments of prefect.yaml onto a Prefect server."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.flows import services

_LINES = 8  # of the output of a deployment that failed


def deploy_all(variables: Mapping[str, str], log: Path | None = None) -> str:
    """Deploys all flows of the current folder's prefect.yaml, and returns what Prefect says.

    Args:
        variables: the environment, which names the server.
        log: gets what Prefect says, too.

    Raises:
        UserError: a deployment is refused.
    """
    command = services.module("prefect", "--no-prompt", "deploy", "--all")
    done = subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    output = done.stdout + done.stderr
    if log is not None:
        log.write_text(output)
    if done.returncode != 0 or "Skipping" in output:
        where = f"; {log.parent.name}/{log.name} ends with" if log is not None else ""
        lines = "\n".join(output.strip().splitlines()[-_LINES:])
        raise UserError(f"`prefect deploy --all` failed{where}:\n{lines}")
    return output
