"""Copies of databases while they are in use, and what a copy needs at another place."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

from lcmlora import masking
from lcmlora.errors import UserError
from lcmlora.registry.lookup import URIS

_SECONDS = 60.0  # that a database may be locked by others

# Where MLflow keeps addresses, which name the project's folder if artifacts lie in it.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("model_version_tags", "value"),
    ("logged_models", "artifact_location"),
)
_ENDED = ("RUNNING", "PENDING", "CANCELLING")


def is_sqlite(path: Path) -> bool:
    """Returns whether a file is an sqlite database."""
    try:
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


def copy_sqlite(source: Path, target: Path) -> None:
    """Copies an sqlite database as it is at one moment, with what its write-ahead log has (sqlite's backup API).

    Raises:
        UserError: it is damaged, or others keep it locked.
    """
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with (
            contextlib.closing(sqlite3.connect(source, timeout=_SECONDS)) as of,
            contextlib.closing(sqlite3.connect(target)) as to,
        ):
            of.backup(to)
            to.execute("PRAGMA journal_mode = DELETE")  # one file, whatever the server has set
            (found,) = to.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise UserError(f"{source}: cannot be copied: {error}") from None
    if found != "ok":
        raise UserError(f"{source}: is damaged: {found}")


def dump_postgresql(uri: str, target: Path) -> None:
    """Writes a PostgreSQL database as it is at one moment to a file, by `pg_dump`.

    Raises:
        UserError: there is no `pg_dump`, or it fails.
    """
    _postgresql("pg_dump", uri, "--format=custom", "--no-owner", f"--file={target}")
    target.chmod(0o600)


def restore_postgresql(source: Path, uri: str) -> None:
    """Writes a dump into an empty PostgreSQL database, by `pg_restore`, whole or not at all.

    Raises:
        UserError: there is no `pg_restore`, it fails, or the database has tables.
    """
    from sqlalchemy import create_engine, inspect

    engine = create_engine(uri)
    try:
        tables = inspect(engine).get_table_names()
    finally:
        engine.dispose()
    if tables:
        raise UserError(
            f"{masking.address(uri)}: has {len(tables)} tables, which a restore would overwrite; make an empty "
            "database and name it in MLFLOW_TRACKING_URI or registry.tracking_uri"
        )
    _postgresql("pg_restore", uri, "--no-owner", "--exit-on-error", "--single-transaction", str(source))


def require_postgresql_tool(name: str) -> None:
    """Raises UserError if a program of PostgreSQL's client is not installed."""
    if shutil.which(name) is None:
        raise UserError(
            f"{name}: no such program, and the registry is a PostgreSQL database; install PostgreSQL's client "
            "(Debian: postgresql-client), of the server's version or later"
        )


def _postgresql(program: str, uri: str, *arguments: str) -> None:
    from sqlalchemy import URL, make_url

    require_postgresql_tool(program)
    url = make_url(uri)
    environment = dict(os.environ)
    if url.password:  # not on the command line, which others see
        environment["PGPASSWORD"] = str(url.password)
    plain = URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query).render_as_string()
    done = subprocess.run(
        [program, "--no-password", f"--dbname={plain}", *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = masking.text(" ".join(done.stderr.split()))
        raise UserError(f"{program} {masking.address(uri)}: {reason}")


def move_addresses(database: Path, former: str, now: str) -> None:
    """Changes the addresses in MLflow's database that begin with the project's former folder."""
    # Of addresses, some have special characters quoted.
    moved = {former: now, f"file://{former}": f"file://{now}", Path(former).as_uri(): Path(now).as_uri()}
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for old, new in moved.items():
            for table, column in _ADDRESSES:
                if column in _columns(connection, table):
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE substr({column}, 1, ?) = ? OR {column} = ?",
                        (new, len(old) + 1, len(old) + 1, f"{old}/", old),
                    )
            # A list of addresses as JSON
            replaced = (f'"{old}/', f'"{new}/', URIS)
            connection.execute("UPDATE model_version_tags SET value = replace(value, ?, ?) WHERE key = ?", replaced)


def end_runs(database: Path) -> None:
    """Marks the runs that went on when a copy of Prefect's database was made as crashed, and gives their slots back.

    They go on nowhere, and nobody would ever end them.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        if "active_slots" in _columns(connection, "concurrency_limit_v2"):
            connection.execute("UPDATE concurrency_limit_v2 SET active_slots = 0")
        for table in ("flow_run", "task_run"):
            if "state_id" not in _columns(connection, table):
                continue
            going = f"SELECT state_id FROM {table} WHERE state_type IN {_ENDED}"
            message = "It was running when the backup was made."
            connection.execute(
                f"UPDATE {table}_state SET type = 'CRASHED', name = 'Crashed', message = ? WHERE id IN ({going})",
                (message,),
            )
            connection.execute(
                f"UPDATE {table} SET state_type = 'CRASHED', state_name = 'Crashed' WHERE state_type IN {_ENDED}"
            )


def _columns(connection: sqlite3.Connection, table: str) -> set[str]:
    rows: list[Any] = connection.execute(f"PRAGMA table_info({table})").fetchall()
    return {row[1] for row in rows}
