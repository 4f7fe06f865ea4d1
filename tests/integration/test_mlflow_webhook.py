"""MLflow's own webhook, made by the block of docs/notifications.md, on a real MLflow server."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lcmlora.config import Registry
from lcmlora.flows.services import NO_TELEMETRY, free_ports
from lcmlora.registry.promotion import promote_passed
from lcmlora.registry.registration import register_release
from tests.support import code_blocks
from tests.support.code_blocks import ROOT
from tests.support.receivers import Receiver, receiver
from tests.support.registries import fresh
from tests.support.releases import write_sealed

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def server(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    registry, port = fresh(tmp_path, tmp_path_factory), free_ports(1)[0]
    # A receiver on this machine is what MLflow refuses by default.
    loopback = {"MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true", "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", registry.tracking_uri]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(port), "--workers", "1"]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen(
            command, env=os.environ | NO_TELEMETRY | loopback, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{address}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert started.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(started.pid, 9)
        started.wait()


@pytest.fixture
def web() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


def test_mlflow_calls_the_webhook_of_the_page_when_a_champion_is_made(
    server: str, web: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("RELEASE_HOOK", web.address)
    monkeypatch.setenv("RELEASE_HOOK_KEY", "a key of ours")
    blocks = [b for b in code_blocks.blocks(ROOT / "docs/notifications.md") if "create_webhook" in b.text]
    exec(compile(blocks[0].text, str(blocks[0]), "exec"), {})
    settings = Registry(tracking_uri=server, experiment="webhooks")
    version = register_release("mini", settings, write_sealed(tmp_path / "one"))
    promote_passed(version, settings, reason="passed the gate")
    until = time.monotonic() + 60
    while not web.requests and time.monotonic() < until:
        time.sleep(0.1)
    ((_, headers, content),) = web.requests
    (document,) = web.documents
    assert document["data"] == {"name": "lcm-lora-mini", "alias": "champion", "version": "1"}
    found = {name.lower(): value for name, value in headers.items()}
    signed = f"{found['x-mlflow-delivery-id']}.{found['x-mlflow-timestamp']}.".encode() + content
    expected = base64.b64encode(hmac.new(b"a key of ours", signed, hashlib.sha256).digest()).decode()
    assert found["x-mlflow-signature"] == f"v1,{expected}"
