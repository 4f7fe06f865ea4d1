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
    pools = {_pool(entry) for entry in _entries(path)}
    if len(pools) != 1 or None in pools:
        named = ", ".join(sorted(str(pool) for pool in pools)) or "none"
        raise UserError(f"{path}: work_pool: expected one pool for all deployments, and there are: {named}")
    (pool,) = pools
    return str(pool)


def _entries(path: Path) -> list[JsonObject]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; `lcmlora init` makes a project with it")
    entries = as_object(read_yaml(path), str(path)).get("deployments")
    if not isinstance(entries, list):
        raise UserError(f"{path}: deployments: expected a list of deployments")
    return [as_object(entry, f"{path}: deployments.{number}") for number, entry in enumerate(entries)]


def _pool(entry: JsonObject) -> str | None:
    pool = entry.get("work_pool")
    name = pool.get("name") if isinstance(pool, dict) else None
    return name if isinstance(name, str) and name else None
