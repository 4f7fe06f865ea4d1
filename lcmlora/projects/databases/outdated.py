"""The databases of a project whose tables the installed MLflow and Prefect want otherwise.

MLflow's server refuses such a database; Prefect's changes it at its start. An upgrade makes a backup first, and changes
both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lcmlora import masking
from lcmlora.errors import UserError
from lcmlora.io.parsing import as_object, read_json
from lcmlora.io.terminal import joined
from lcmlora.project import Project
from lcmlora.projects.databases import revisions

BACKUPS = ".backups"  # the folder in a project for what an upgrade saves
MLFLOW = ("mlflow", "store/db_migrations/versions")
PREFECT = ("prefect", "server/database/_migrations/versions/sqlite")
_QUIET = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


@dataclass(frozen=True)
class Database:
    """A database whose tables are those of an earlier version.

    command: changes them, in the environment `variables`.
    """

    name: str  # for people
    owner: str  # MLflow or Prefect
    revision: str
    wanted: str
    command: tuple[str, ...]
    variables: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name}: {self.owner}'s tables are of revision {self.revision}, and become those of {self.wanted}"


def outdated(project: Project, tracking_uri: str) -> list[Database]:
    """Returns the databases of a project that the installed MLflow and Prefect are to change.

    Args:
        tracking_uri: of the registry. What a server has is the server's to change.

    Raises:
        UserError: a database cannot be read, or is of a later version than what is installed.
    """
    found = [_mlflow(project, tracking_uri), _prefect(project)]
    return [database for database in found if database is not None]


def refuse_running(project: Project) -> None:
    """Raises UserError if `lcmlora up` has started servers, which have the databases open."""
    state = project.root / ".up" / "state.json"
    if state.is_file() and as_object(read_json(state), str(state)).get("started"):
        raise UserError("the servers of `lcmlora up` have these databases open: `lcmlora down`, then upgrade again")


def save(project: Project) -> Path:
    """Makes a backup of the project, and returns the folder that has it. Raises UserError if there is none."""
    folder = project.root.absolute() / BACKUPS
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    command = [sys.executable, "-P", "-m", "lcmlora.flows.backup.verbs", "backup", str(folder)]
    _run(command, project, {}, "no backup was made, and nothing was changed")
    return folder


def upgrade(database: Database, project: Project) -> None:
    """Changes the tables of a database. Raises UserError if that fails."""
    _run(list(database.command), project, database.variables, f"{database.name} is as the backup has it, or half way")


def _run(command: list[str], project: Project, variables: Mapping[str, str], otherwise: str) -> None:
    environment = {**os.environ, **_QUIET, **variables}
    done = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{otherwise}: {masking.text(joined(done.stderr[-2000:] or done.stdout[-2000:]))}")


def _mlflow(project: Project, uri: str) -> Database | None:
    variables: dict[str, str] = {}
    if uri.startswith("sqlite:///"):
        path = project.root / uri.removeprefix("sqlite:///")
        revision = revisions.of_file(path)
        name, address = str(path), f"sqlite:///{path.absolute()}"
    elif uri.startswith("postgresql"):
        revision = revisions.of_server(uri)
        name = masking.address(uri)
        address, variables = _without_password(uri)
    else:
        return None
    command = (sys.executable, "-P", "-m", "mlflow", "db", "upgrade", address)
    return _database(name, "MLflow", revision, MLFLOW, command, variables)


def _prefect(project: Project) -> Database | None:
    home = project.root.absolute() / ".up" / "prefect"
    path = home / "prefect.db"
    command = (sys.executable, "-P", "-m", "prefect", "server", "database", "upgrade", "--yes")
    variables = {"PREFECT_HOME": str(home), "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}"}
    return _database(str(path), "Prefect", revisions.of_file(path), PREFECT, command, variables)


def _database(
    name: str,
    owner: str,
    revision: str | None,
    migrations: tuple[str, str],
    command: tuple[str, ...],
    variables: Mapping[str, str],
) -> Database | None:
    """Returns a database that is to be changed, None where it is as it should be, or there is none."""
    if revision is None:
        return None
    known = revisions.known(*migrations)
    newest = known.keys() - {former for formers in known.values() for former in formers}
    if revision in newest:
        return None
    if revision not in known:
        raise UserError(
            f"{name}: its tables are of revision {revision}, which the installed {owner} does not know; install the "
            f"version of {owner} that it was last used with, or a later one"
        )
    return Database(name, owner, revision, ", ".join(sorted(newest)), command, variables)


def _without_password(uri: str) -> tuple[str, dict[str, str]]:
    """Returns the address for a command line, and the variable that has the password, which others must not see."""
    from sqlalchemy import URL, make_url

    url = make_url(uri)
    address = URL.create(url.drivername, url.username, None, url.host, url.port, url.database, url.query)
    return address.render_as_string(), {"PGPASSWORD": str(url.password)} if url.password else {}
