"""What prefect.yaml says of the work pool and the deployments, which carry the project's name."""

from __future__ import annotations

from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject, as_object, read_yaml


def work_pool(path: Path) -> str:
    """Returns the work pool of a prefect.yaml, which is that of all its deployments.

    Raises:
        UserError: the file is missing or no list of deployments, or they have several pools or none.
    """
    pools = {_pool(entry) for entry in entries(path)}
    if len(pools) != 1 or None in pools:
        named = ", ".join(sorted(str(pool) for pool in pools)) or "none"
        raise UserError(f"{path}: work_pool: expected one pool for all deployments, and there are: {named}")
    (pool,) = pools
    return str(pool)


def project(path: Path) -> str:
    """Returns the name of the project in a prefect.yaml, by which a server's events of several projects are told apart.

    Raises:
        UserError: the file is missing, or has no name.
    """
    name = _read(path).get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: name: expected the project's name")
    return name


def deployments(path: Path) -> set[tuple[str, str]]:
    """Returns the entrypoint and the name of each deployment of a prefect.yaml. Raises UserError as `work_pool`."""
    return {(str(entry.get("entrypoint")), str(entry.get("name"))) for entry in entries(path)}


def entries(path: Path) -> list[JsonObject]:
    """Returns what a prefect.yaml says of each deployment. Raises UserError: the file is missing or no such list."""
    found = _read(path).get("deployments")
    if not isinstance(found, list):
        raise UserError(f"{path}: deployments: expected a list of deployments")
    return [as_object(entry, f"{path}: deployments.{number}") for number, entry in enumerate(found)]


def _read(path: Path) -> JsonObject:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `lcmlora init` makes a project with it")
    return as_object(read_yaml(path), str(path))


def _pool(entry: JsonObject) -> str | None:
    pool = entry.get("work_pool")
    name = pool.get("name") if isinstance(pool, dict) else None
    return name if isinstance(name, str) and name else None
