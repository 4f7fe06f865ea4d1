"""A SeaweedFS server of one process, which can be killed and comes back with what it had stored."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcmlora.flows import services
from lcmlora.flows.services import OWNER, REGION, S3, Identity, free_ports
from lcmlora.flows.services import weed as executable

__all__ = ["IDENTITIES", "REGION", "Identity", "SeaweedFS", "executable", "free_ports"]

IDENTITIES = {
    "writer": Identity("writer", "writer-secret", OWNER),
    "reader": Identity("reader", "reader-secret", ("Read", "List")),
}


class SeaweedFS:
    """The S3 server of one folder and one set of ports.

    Args:
        root: holds its data, log and identities.
        identities: one of them, `writer`, must be allowed everything.
    """

    def __init__(self, root: Path, identities: Mapping[str, Identity] = IDENTITIES) -> None:
        self._root = root
        self._identities = dict(identities)
        self.ports = free_ports(8)
        self._server: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self.ports[6]}"
        self.keys = {name: (each.access, each.secret) for name, each in identities.items()}
        self._service = services.seaweedfs(
            root, self.ports, S3(self.endpoint, *self.keys["writer"]), self.keys_folder, key="of this test"
        )

    @property
    def keys_folder(self) -> Path:
        return self._root / "keys"

    @property
    def pid(self) -> int:
        assert self._server is not None
        return self._server.pid

    def start(self) -> None:
        """Returns when an object can be written. Raises RuntimeError with the log's end where that takes a minute."""
        assert self._server is None
        services.write_keys(self.keys_folder, self._identities)
        with (self._root / "log").open("ab") as log:
            self._server = subprocess.Popen(
                self._service.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._root,
                env=os.environ | self._service.environment,
                umask=0o077,  # as in flows.background
            )
        self._wait(self._server)

    def kill(self) -> None:
        """Ends it at once (SIGKILL)."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def restart(self) -> None:
        """Starts it again where it was: the same ports, folder and objects."""
        self.kill()
        self.start()

    def client(self, name: str = "writer") -> Any:
        return S3(self.endpoint, *self.keys[name]).client()

    def _wait(self, server: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < until:
            if self._service.answers():
                return
            time.sleep(0.3)
        self.kill()
        raise RuntimeError(f"SeaweedFS did not start: {(self._root / 'log').read_text()[-2000:]}")
