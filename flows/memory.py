"""What the flows remember from one run to the next: a Prefect variable for each thing, so that none outgrows one.

Prefect refuses a variable of more than 5,000 bytes, and names that have anything but lowercase letters, digits, dashes
and underscores, or more than 255 of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.variables import Variable

from lcmlora.config import Config
from lcmlora.flows import has_server
from lcmlora.flows.servers import definitions
from lcmlora.tasks.output import slug

Entry = dict[str, Any]  # JSON

LARGEST = 4_500  # bytes of an entry as JSON; Prefect's limit is 5,000 with the key

_PAGE = 200  # variables; Prefect returns no more in one answer
_SHOWN = 60  # characters of a key in the name of its variable, which are for people; its digest tells keys apart


class Memory:
    """The entries of one subject, such as `watch`, of one project. Every entry is written by itself.

    A server's memory is the same for all clones of a project, whatever worker looks: a project is known by its name and
    its experiment in MLflow. Without a server, all projects of this user share one database, so that the folder's path
    tells them apart.
    """

    def __init__(self, subject: str, settings: Config) -> None:
        identity = f"{project()}\0{settings.registry.experiment}".encode()
        if not has_server():
            identity += b"\0" + os.fsencode(Path.cwd())
        self._prefix = f"lcmlora_{subject}_{hashlib.sha256(identity).hexdigest()[:12]}_"

    def read(self) -> dict[str, Entry]:
        """Returns all entries by their keys."""
        found: dict[str, Entry] = {}
        with get_client(sync_client=True) as client:
            for name, value in _variables(client, self._prefix):
                # Anybody can change a variable on Prefect's pages.
                if isinstance(value, dict) and isinstance(value.get("key"), str) and self.name(value["key"]) == name:
                    found[value.pop("key")] = value
        return found

    def write(self, key: str, entry: Entry) -> None:
        """Keeps an entry of at most LARGEST bytes; the former one of this key is overwritten."""
        Variable.set(self.name(key), {"key": key, **entry}, overwrite=True)

    def forget(self, key: str) -> None:
        """Deletes an entry, if there is one."""
        Variable.unset(self.name(key))

    def name(self, key: str) -> str:
        """Returns the name of the variable that has the entry of this key."""
        return f"{self._prefix}{slug(key)[:_SHOWN]}_{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def project() -> str:
    """Returns the name of the project in the current folder, which its deployments have, too."""
    path = Path("prefect.yaml")
    return definitions.project(path) if path.is_file() else Path.cwd().name


@contextlib.contextmanager
def former(settings: Config) -> Iterator[dict[str, str]]:
    """Yields what lcmlora kept of a project's watched inputs in one variable in 0.1.0, and then deletes it.

    A flow that is killed before the end finds the variable again.
    """
    name = f"watch_{slug(settings.registry.experiment)}"
    if not has_server():
        name += f"_{hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:12]}"
    value: Any = Variable.get(name, default=None)
    states: Entry = value if isinstance(value, dict) else {}
    yield {key: state for key, state in states.items() if isinstance(state, str)}
    if value is not None:
        Variable.unset(name)


def _variables(client: SyncPrefectClient, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of all variables whose name begins with this."""
    offset = 0
    while True:
        asked = {"variables": {"name": {"like_": prefix}}, "sort": "NAME_ASC", "limit": _PAGE, "offset": offset}
        page = client.request("POST", "/variables/filter", json=asked).json()
        yield from ((each["name"], each["value"]) for each in page if each["name"].startswith(prefix))
        if len(page) < _PAGE:
            return
        offset += len(page)
