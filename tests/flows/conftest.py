"""One Prefect server for all flow tests, and a project in miniature whose stages copy what was made beforehand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import Artifact
from prefect.testing.utilities import prefect_test_harness

import lcmlora.project
from lcmlora import bases
from lcmlora.config import Base
from lcmlora.releases import package
from tests.support import repositories
from tests.support.miniature import RESOLUTION
from tests.support.registries import fresh
from tests.support.releases import load_settings, settings, write_stages

MODELS = ("a", "b", "c")  # the third is not among `models` of params.yaml

LIMIT = f"gpu-of-test-{os.getpid()}"  # what trains on this machine must not keep tests waiting

STAGES = """
stages:
  prepare:
    cmd: mkdir -p data/pictures && cp pictures data/pictures/train.jsonl
    deps: [pictures]
    outs: [data/pictures]
  encode:
    matrix: &models
      model: [a, b, c]
    cmd: mkdir -p data/latents && cp -r data/pictures data/latents/${item.model}
    deps: [data/pictures]
    outs:
      - data/latents/${item.model}
  reference:
    matrix: *models
    cmd: mkdir -p reference && cp -r data/pictures reference/${item.model}
    deps: [data/pictures]
    outs:
      - reference/${item.model}
  distill:
    matrix: *models
    cmd: sh distill.sh ${item.model}
    deps:
      - data/latents/${item.model}
      - stock/${item.model}
    params:
      - bases.${item.model}
    outs:
      - adapters/${item.model}
  evaluate:
    matrix: *models
    cmd:
      - mkdir -p evaluation metrics
      - cp -r stock/evaluation/${item.model} evaluation
      - cp stock/metrics/${item.model}.json metrics
    deps:
      - adapters/${item.model}
      - reference/${item.model}
    outs:
      - evaluation/${item.model}
      - metrics/${item.model}.json:
          cache: false
  package:
    matrix: *models
    cmd: mkdir -p release && cp -r stock/release/${item.model} release
    deps:
      - adapters/${item.model}
      - evaluation/${item.model}
    outs:
      - release/${item.model}
"""

DISTILL = """
test ! -e broken-$1 || { echo "error: step 7: the loss is not finite" >&2; exit 2; }
echo "distilling $1" >&2
echo "$1" >> distilled
mkdir -p adapters
cp -r stock/adapters/$1 adapters
"""


# Loops of the server that nothing here waits for.
_IDLE = ("CANCELLATION_CLEANUP", "FOREMAN", "LATE_RUNS", "PAUSE_EXPIRATIONS", "SCHEDULER", "TRIGGERS")


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    quiet = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in _IDLE}
    quiet["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    with mock.patch.dict(os.environ, quiet), prefect_test_harness(server_startup_timeout=300):
        with get_client(sync_client=True) as client:
            limit = GlobalConcurrencyLimitCreate(name=LIMIT, limit=1)
            client.request("POST", "/v2/concurrency_limits/", json=limit.model_dump(mode="json"))
        yield


@pytest.fixture(scope="session")
def stock(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What distill, evaluate and package give for three models."""
    root = tmp_path_factory.mktemp("stock")
    base = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    config = load_settings(base_folder, models=MODELS)
    for seed, model in enumerate(MODELS):
        loaded = bases.load(model, base, base_folder, device=torch.device("cpu"))
        write_stages(loaded, root, model=model, seed=seed)
        package.package_release(model, config, lcmlora.project.Project(root), base_folder)
    return root


def artifacts(key: str) -> list[Any]:
    """Returns what the flows left under this key, the newest last."""
    with get_client(sync_client=True) as client:
        asked = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
        found = client.request("POST", "/artifacts/filter", json=asked).json()
    return [Artifact.model_validate(each) for each in reversed(found)]


@dataclass(frozen=True)
class Project:
    """A project folder, which is the current one, and the registry it writes to."""

    root: Path
    tracking_uri: str

    def mlflow(self) -> Any:
        return MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)

    def versions(self, model: str) -> list[Any]:
        found = self.mlflow().search_model_versions(f"name = 'lcm-lora-{model}'")
        return sorted(found, key=lambda version: int(version.version))

    def aliases(self, model: str) -> dict[str, int]:
        found = self.mlflow().get_registered_model(f"lcm-lora-{model}").aliases
        return {alias: int(number) for alias, number in found.items()}

    def releases(self) -> list[str]:
        root = self.root / "releases"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*.json") if path.name == "manifest.json")

    def distilled(self) -> list[str]:
        return (self.root / "distilled").read_text().split()

    def change(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Lets `change` work on the settings of params.yaml."""
        raw = yaml.safe_load((self.root / "params.yaml").read_text())
        change(raw)
        (self.root / "params.yaml").write_text(yaml.safe_dump(raw))

    def params(self, name: str, **changes: dict[str, Any]) -> str:
        """Writes the settings with these changes to a file of this name and returns the name."""
        raw = yaml.safe_load((self.root / "params.yaml").read_text())
        for section, values in changes.items():
            raw[section] |= values
        (self.root / name).write_text(yaml.safe_dump(raw))
        return name


@pytest.fixture
def project(
    prefect: None,
    stock: Path,
    base_folder: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Project:
    root = repositories.make(tmp_path / "project", STAGES)
    (root / "stock").symlink_to(stock)
    for model in MODELS:
        (stock / model).write_text(model)
    (root / "pictures").write_text("{}\n")
    (root / "distill.sh").write_text(DISTILL)
    registry = fresh(root, tmp_path_factory)
    raw = settings(base_folder, models=MODELS, registry={"tracking_uri": registry.tracking_uri})
    raw |= {"models": ["a", "b"]}
    raw["flow"] |= {"gpu_limit": LIMIT, "retry_seconds": 0.05}
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(root)
    return Project(root, registry.tracking_uri)
