"""Freeing the space of deleted runs and versions in MLflow's database, which a client over http cannot reach."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lcmlora.config import Registry
from lcmlora.inference import mlflow_internals
from lcmlora.registry.retention.tombstones import MARK
from lcmlora.registry.tracking import connect, reaching

VARIABLE = "MLFLOW_BACKEND_STORE_URI"  # of MLflow: its server's database; `lcmlora up` sets it for its worker
_SQLITE = "sqlite:///"
_WORTH = 0.2  # share of a file that must be free before it is written anew
_BUSY = 10.0  # seconds to wait for others that write


@dataclass(frozen=True)
class Space:
    """Bytes of an sqlite file, and those of them in pages that nothing uses."""

    total: int
    free: int


def database_of(settings: Registry) -> str | None:
    """Returns the address of MLflow's database, None where only its server is known."""
    if not settings.tracking_uri.startswith(("http://", "https://", "databricks")):
        return settings.tracking_uri
    return os.environ.get(VARIABLE) or None


def delete_rows(settings: Registry, names: Collection[str], runs: Collection[str] = ()) -> int:
    """Deletes the rows of pruned runs and deleted versions for good, and returns how many.

    Args:
        settings: of the database itself (`database_of`).
        runs: deleted runs without the mark of pruned ones, whose artifacts are gone.
        names: registered models.

    Raises:
        UserError: the database cannot be reached.
    """
    from mlflow.entities import ViewType

    with reaching(settings, "the space of deleted runs is not free yet"):
        client = connect(settings)
        experiment = client.get_experiment_by_name(settings.experiment)
        found, token = [], None
        while experiment is not None:
            page = client.search_runs([experiment.experiment_id], "", ViewType.DELETED_ONLY, 1000, page_token=token)
            found += [str(run.info.run_id) for run in page if MARK in run.data.tags or run.info.run_id in runs]
            token = page.token
            if not token:
                break
        return mlflow_internals.delete_rows(client, found, names)


def space(settings: Registry) -> Space | None:
    """Returns the space of an sqlite database, None for other databases."""
    path = _file(settings)
    if path is None:
        return None
    with contextlib.closing(sqlite3.connect(path, timeout=_BUSY)) as database:
        page, pages, free = (
            int(database.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_size", "page_count", "freelist_count")
        )
    return Space(page * pages, page * free)


def compact(settings: Registry) -> Space | None:
    """Writes an sqlite file anew if much of it is free, and returns its space before that; None if it was left.

    Readers and writers wait meanwhile. It is left, too, if others write all the time.
    """
    path, before = _file(settings), space(settings)
    if path is None or before is None or before.free < _WORTH * before.total:
        return None
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_BUSY, isolation_level=None)) as database:
            database.execute("VACUUM")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        return None
    return before


def _file(settings: Registry) -> Path | None:
    uri = settings.tracking_uri
    path = Path(uri.removeprefix(_SQLITE).partition("?")[0])
    return path if uri.startswith(_SQLITE) and path.is_file() else None
