"""Whether this terminal knows the servers of the project: those of `lcmlora up`, where they run.

A terminal without `.up/environment` would open MLflow's database behind the server's back. Its artifacts are not where
the server keeps them, and releases would go to another store.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.io.parsing import as_object, read_json

_SECONDS = 1.0  # for a connection on this machine
_SQLITE = "sqlite:///"


def require_environment(settings: Registry, root: Path | None = None) -> None:
    """Raises UserError where the servers of `lcmlora up` run for this registry, and its address names the database.

    Args:
        root: the project's folder. By default the current one, and that of an sqlite database.
    """
    uri = settings.tracking_uri
    if uri.startswith("http"):
        return
    folders = [Path() if root is None else root]
    if uri.startswith(_SQLITE):
        folders.append(Path(uri.removeprefix(_SQLITE).partition("?")[0]).parent)
    for folder in folders:
        if (server := running_server(folder)) is not None:
            raise UserError(
                f"{folder / '.up'}: the servers of `lcmlora up` run, and this terminal does not know them: "
                f"`source {folder / '.up/environment'}` (MLflow is at {server})"
            )


def running_server(project: Path) -> str | None:
    """Returns the address of the MLflow server that `lcmlora up` runs in a project, None where none runs."""
    path = project / ".up" / "state.json"
    try:
        if not path.is_file():
            return None
    except PermissionError:  # another user's, whose servers ask for a password
        return None
    state = as_object(read_json(path), str(path))
    exported, started = (as_object(state.get(key) or {}, f"{path}: {key}") for key in ("exported", "started"))
    address = exported.get("MLFLOW_TRACKING_URI")
    process = started.get("mlflow")
    if not isinstance(address, str) or not isinstance(process, dict) or not _is_alive(process.get("pid")):
        return None
    return address if _listens(address) else None


def _is_alive(pid: object) -> bool:
    if type(pid) is not int:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _listens(address: str) -> bool:
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_SECONDS).close()
    except OSError:
        return False
    return True
