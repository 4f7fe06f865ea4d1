"""Lookups from anywhere: another process in an empty folder, with the registry's address and few packages alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Registry
from lcmlora.inference import pipelines
from lcmlora.registry import promotion, registration
from lcmlora.releases import bundle
from tests.integration.relay import Relay
from tests.integration.tracking_servers import MLflow
from tests.support import served, service

pytestmark = pytest.mark.integration

MODEL = "anywhere"


@dataclass(frozen=True)
class Kept:
    """A champion on the server, and what it draws."""

    relay: Relay
    sha256: str
    picture: str


@pytest.fixture(scope="module")
def kept(
    mlflow_server: MLflow, miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kept]:
    released = served.package(miniatures("sd15"), tmp_path_factory.mktemp("released"))
    with Relay(mlflow_server.port) as relay:
        settings = Registry(tracking_uri=relay.uri, experiment="anywhere")
        version = registration.register_release(MODEL, settings, released)
        promotion.promote_passed(version, settings, reason="first")
        (picture,) = pipelines.load(released, warm=False)("owl", steps=2, seed=3)
        yield Kept(relay, version.sha256, hashlib.sha256(picture.tobytes()).hexdigest())


def start(cache: Path, address: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    folder = cache.parent / "empty"
    folder.mkdir(exist_ok=True)
    changed = {"PYTHONPATH": str(service.ROOT), "MLFLOW_TRACKING_URI": address, "XDG_CACHE_HOME": str(cache)}
    kept = {name: value for name, value in os.environ.items() if name != "LCMLORA_CACHE"}
    command = [sys.executable, service.__file__, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=kept | changed | environment, stdout=pipe, stderr=pipe, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return dict(json.loads(out))


def test_services_with_nothing_but_the_registrys_extra_look_up_pull_verify_and_draw_also_offline(
    kept: Kept, tmp_path: Path
):
    """What is looked up without the registry, where it is gone, is in tests/registry/test_downloads.py."""
    cache = tmp_path / "caches"
    one, other = start(cache, kept.relay.uri, f"{MODEL}@champion", "owl"), start(cache, kept.relay.uri, f"{MODEL}/1")
    first, second = answer(one), answer(other)  # they began together, on an empty cache
    for found in (first, second):
        assert (found["reference"], found["sha256"]) == (f"lcm-lora-{MODEL}/1", kept.sha256)
        assert found["verified"] == f"lcm-lora-{MODEL}/1" and found["files"] == sorted(bundle.ADAPTER_FILES)
        assert found["folder"] == str(cache / "lcmlora/adapters" / f"sha256-{kept.sha256[:12]}")
        assert found["imported"] == [] and found["refused"]
    assert first["picture"] == kept.picture
    asked = len(kept.relay.requests)
    offline = answer(start(cache, kept.relay.uri, f"{MODEL}@champion", LCMLORA_OFFLINE="1"))
    assert (offline["folder"], offline["verified"]) == (first["folder"], first["verified"])
    assert len(kept.relay.requests) == asked
    assert list((tmp_path / "empty").iterdir()) == []
