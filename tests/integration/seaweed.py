"""A SeaweedFS server of one process, which can be killed and comes back with what it had stored."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

REGION = "us-east-1"


@dataclass(frozen=True)
class Identity:
    """Who may do what, such as `Read`, or of one bucket or prefix only `Write:bucket/prefix/*`."""

    access: str
    secret: str
    actions: tuple[str, ...]


IDENTITIES = {
    "writer": Identity("writer", "writer-secret", ("Admin", "Read", "Write", "List")),
    "reader": Identity("reader", "reader-secret", ("Read", "List")),
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def executable() -> str | None:
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


class SeaweedFS:
    """The S3 server of one folder and one set of ports.

    Args:
        root: holds its data, log and identities.
        identities: one of them, `writer`, must be allowed everything.
    """

    def __init__(self, root: Path, identities: Mapping[str, Identity] = IDENTITIES) -> None:
        self._root = root
        self._identities = dict(identities)
        self._ports = free_ports(8)
        self._server: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports[6]}"
        self.keys = {name: (each.access, each.secret) for name, each in identities.items()}

    def start(self) -> None:
        """Returns when an object can be written. Raises RuntimeError with the log's end where that takes a minute."""
        assert self._server is None
        users = [
            {"name": n, "credentials": [{"accessKey": i.access, "secretKey": i.secret}], "actions": list(i.actions)}
            for n, i in self._identities.items()
        ]
        (self._root / "identities.json").write_text(json.dumps({"identities": users}))
        with (self._root / "log").open("ab") as log:
            environment = os.environ | {"WEED_S3_SSE_KEY": "of this test"}  # without one it cannot encrypt
            self._server = subprocess.Popen(
                self._command(), stdout=log, stderr=subprocess.STDOUT, cwd=self._root, env=environment
            )
        self._wait(self._server)

    def kill(self) -> None:
        """Ends it at once (SIGKILL); ending in order takes it 20 seconds."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def restart(self) -> None:
        """Starts it again where it was: the same ports, folder and objects."""
        self.kill()
        self.start()

    def client(self, name: str = "writer") -> Any:
        access, secret = self.keys[name]
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=access,
            aws_secret_access_key=secret,
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )

    def _command(self) -> list[str]:
        ports = self._ports
        flags = {
            "dir": self._root,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.port": ports[0],
            "master.port.grpc": ports[1],
            "volume.port": ports[2],
            "volume.port.grpc": ports[3],
            "filer.port": ports[4],
            "filer.port.grpc": ports[5],
            "s3.port": ports[6],
            "s3.port.grpc": ports[7],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": self._root / "identities.json",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 0,
            "master.telemetry": "false",
            "master.electionTimeout": "1s",
            "volume.preStopSeconds": 0,
        }
        return [str(executable()), "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in flags.items())]

    def _wait(self, server: subprocess.Popen[bytes]) -> None:
        client = self.client()
        until = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < until:
            try:
                if all(bucket["Name"] != "ready" for bucket in client.list_buckets()["Buckets"]):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return
            except (BotoCoreError, ClientError):
                time.sleep(0.3)
        self.kill()
        raise RuntimeError(f"SeaweedFS did not start: {(self._root / 'log').read_text()[-2000:]}")
