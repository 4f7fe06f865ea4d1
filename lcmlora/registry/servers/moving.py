"""Moving the artifacts of plain runs to MLflow's server, which `lcmlora up` has put in front of their database.

The files go through the server, so into its bucket, and are checked as it lists them. Then one transaction changes the
places in the database: of the experiment, its runs and their versions. If this is interrupted before, it begins again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.io.terminal import note
from lcmlora.registry.servers.artifacts import local_folder

if TYPE_CHECKING:
    from sqlalchemy import Connection

_PLACES = (("runs", "artifact_uri"), ("model_versions", "storage_location"), ("model_versions", "source"))


def move_artifacts(database: str, settings: Registry, root: Path) -> int:
    """Moves the artifacts of the configured experiment to the server, and returns the number of runs that had any.

    The folder is left as it is. Nothing happens where the experiment keeps its artifacts on a server already.

    Args:
        database: SQLAlchemy's address of the server's database.
        settings: of the registry, with the server's address.
        root: the project's folder, where the artifacts are looked for if it was moved.

    Raises:
        UserError: a file could not be moved.
    """
    from sqlalchemy import create_engine, text

    engine = create_engine(database)
    try:
        with engine.connect() as connection:
            found = connection.execute(
                text("SELECT experiment_id, artifact_location FROM experiments WHERE name = :name"),
                {"name": settings.experiment},
            ).all()
        moved = 0
        for number, location in found:
            folder = local_folder(location or "") if location else None
            if folder is None:
                continue
            kept = next((each for each in (folder, root / "mlruns" / str(number)) if each.is_dir()), None)
            with engine.connect() as connection:
                places = _places_of_runs(connection, number, location)
            if kept is None and places:
                note(
                    f"note: MLflow's experiment {settings.experiment} keeps its artifacts in {folder}, which is not "
                    "here: bring it back, or name another experiment (registry.experiment)"
                )
                continue
            target = f"mlflow-artifacts:/{number}"
            if kept is not None:
                moved += sum(_upload(kept / place, f"{target}/{place}", settings) for place in places)
            with engine.begin() as connection:
                _rewrite(connection, number, location, target)
        return moved
    finally:
        engine.dispose()


def _places_of_runs(connection: Connection, experiment: Any, location: str) -> list[str]:
    """Returns the places of all runs' artifacts below that of their experiment."""
    from sqlalchemy import text

    rows = connection.execute(text("SELECT artifact_uri FROM runs WHERE experiment_id = :id"), {"id": experiment})
    below = f"{location}/"
    return [uri.removeprefix(below) for (uri,) in rows if uri and uri.startswith(below)]


def _upload(folder: Path, target: str, settings: Registry) -> int:
    """Sends a folder through the server, and compares what it lists. Returns 0 where there is nothing in it."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    if not files:
        return 0
    repository = get_artifact_repository(target, tracking_uri=settings.tracking_uri)
    repository.log_artifacts(str(folder))
    sizes: dict[str, int] = {}
    folders: list[str | None] = [None]
    while folders:
        for item in repository.list_artifacts(folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                sizes[item.path] = int(item.file_size or 0)
    for name, file in sorted(files.items()):
        if sizes.get(name) != file.stat().st_size:
            raise UserError(f"{file}: was sent to MLflow's server, which does not list it; run `lcmlora up` again")
    return 1


def _rewrite(connection: Connection, experiment: Any, location: str, target: str) -> None:
    from sqlalchemy import text

    values = {"old": location, "new": target, "id": experiment, "start": len(location) + 1, "below": f"{location}/"}
    connection.execute(text("UPDATE experiments SET artifact_location = :new WHERE experiment_id = :id"), values)
    for table, column in _PLACES:
        connection.execute(
            text(
                f"UPDATE {table} SET {column} = :new || substr({column}, :start) "
                f"WHERE substr({column}, 1, :start) = :below"
            ),
            values,
        )
