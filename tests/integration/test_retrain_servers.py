"""The main job as a command on real servers: killed twice on its way, it ends with one release and one champion."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lcmlora import bases, registry
from lcmlora.config import Base, Registry
from lcmlora.flows import services
from lcmlora.io.files import sha256_folder
from lcmlora.project import Project
from lcmlora.releases import bundle, package
from tests.flows.conftest import DISTILL, LIMIT, STAGES
from tests.integration.relay import Relay
from tests.integration.seaweed import REGION, SeaweedFS
from tests.integration.tracking_servers import MLFLOW, PASSWORD, PREFECT, MLflow, PrefectServer
from tests.support import repositories
from tests.support.miniature import RESOLUTION
from tests.support.releases import load_settings, settings, write_stages

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TO = "s3://team/releases"
CHAMPION = "lcm-lora-a@champion"
HEADERS = {"Content-Type": "application/json", "Authorization": services.basic_authorization(PREFECT)}


@dataclass(frozen=True)
class State:
    """What the stores hold after a run, and how the run ended."""

    status: int
    output: str
    objects: dict[str, str]  # of published releases, with what changes when one is written again
    versions: list[int]
    aliases: dict[str, int]
    runs: int


@dataclass
class Team:
    """A project's folder, the servers it works with, and the environment of its commands."""

    root: Path
    s3: SeaweedFS
    relay: Relay
    prefect: PrefectServer
    environment: dict[str, str]
    states: list[State] = field(default_factory=list)

    @property
    def registry(self) -> Registry:
        return Registry(tracking_uri=self.relay.uri, experiment="team", alias="champion")

    def retrain(self, killed_at: str | None = None) -> None:
        """Runs the flow, which dies when it sends MLflow a request that the pattern matches."""
        command = [sys.executable, "-m", "flows.retrain", "--publish", TO]
        log = self.root.with_name("output")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        if killed_at:
            self.relay.at(killed_at, lambda: os.kill(process.pid, signal.SIGKILL))
        status = process.wait(300)
        self.states.append(self._look(status, log.read_text()))

    def command(self, *arguments: str, cwd: Path | None = None) -> str:
        """Returns the standard output of a command that must succeed."""
        result = subprocess.run(arguments, cwd=cwd or self.root, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def objects(self, bucket: str) -> dict[str, dict[str, Any]]:
        pages = self.s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {entry["Key"]: entry for page in pages for entry in page.get("Contents", [])}

    def read(self, bucket: str, key: str) -> bytes:
        return bytes(self.s3.client().get_object(Bucket=bucket, Key=key)["Body"].read())

    def _look(self, status: int, output: str) -> State:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.relay.uri, registry_uri=self.relay.uri)
        experiment = client.get_experiment_by_name("team")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        models = client.search_registered_models("name = 'lcm-lora-a'")
        versions = [int(version.version) for version in client.search_model_versions("name = 'lcm-lora-a'")]
        aliases = client.get_registered_model("lcm-lora-a").aliases if models else {}
        published = {k: f"{v['ETag']} {v['LastModified']}" for k, v in self.objects("team").items() if "releases/" in k}
        return State(status, output, published, versions, {k: int(v) for k, v in aliases.items()}, len(runs))


@pytest.fixture(scope="module")
def stock(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What distill, evaluate and package give, for the very base that is on disk."""
    root = tmp_path_factory.mktemp("stock")
    base = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    write_stages(bases.load("a", base, base_folder, device=torch.device("cpu")), root, model="a")
    made = root / "adapters/a/config.json"
    facts = json.loads(made.read_text())
    facts["base"]["digest"] = sha256_folder(base_folder / "unet")
    made.write_text(json.dumps(facts))
    settings = load_settings(base_folder, models=("a",))
    package.package_release("a", settings, Project(root), base_folder)
    (root / "a").write_text("a")
    return root


@pytest.fixture(scope="module")
def team(
    prefect_server: PrefectServer,
    s3: SeaweedFS,
    mlflow_server: MLflow,
    base_folder: Path,
    stock: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Team]:
    """The project after three runs: killed before it registers, killed before it promotes, and finished."""
    folder = tmp_path_factory.mktemp("team")
    root = repositories.make(folder / "project", STAGES.replace("[a, b, c]", "[a]"))
    (root / "stock").symlink_to(stock)
    (root / "pictures").write_text("{}\n")
    (root / "distill.sh").write_text(DISTILL)
    raw = settings(base_folder, models=("a",), registry={"experiment": "team"}, flow={"gpu_limit": LIMIT})
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    s3.client().create_bucket(Bucket="team")
    prefect_server.wait()
    body = json.dumps({"name": LIMIT, "limit": 1}).encode()
    limits = f"{prefect_server.api}/v2/concurrency_limits/"
    urllib.request.urlopen(urllib.request.Request(limits, body, HEADERS), timeout=30)
    access, secret = s3.keys["writer"]
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "GIT_")
    with Relay(mlflow_server.port) as relay:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "DVC_NO_ANALYTICS": "1",
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": s3.endpoint,
            "MLFLOW_TRACKING_URI": relay.uri.replace("://", f"://{MLFLOW.pair}@"),
            **prefect_server.environment,
            "PREFECT_HOME": str(folder / "prefect"),
            "GIT_AUTHOR_NAME": "team",
            "GIT_AUTHOR_EMAIL": "team@example.org",
            "GIT_COMMITTER_NAME": "team",
            "GIT_COMMITTER_EMAIL": "team@example.org",
        }
        team = Team(root, s3, relay, prefect_server, environment)
        team.command("dvc", "remote", "add", "--default", "team", "s3://team/dvc")
        team.retrain(killed_at="POST .*/runs/create")
        team.retrain(killed_at="POST .*/registered-models/alias")
        team.retrain()
        yield team


def test_a_run_killed_between_publishing_and_registering_leaves_a_whole_release_and_no_version(team: Team):
    first = team.states[0]
    assert first.status == -signal.SIGKILL, first.output
    assert (first.versions, first.aliases, first.runs) == ([], {}, 0)
    assert sum(key.endswith("/manifest.json") for key in first.objects) == 1
    assert not any("/channels/" in key for key in first.objects)


def test_the_next_run_killed_between_registering_and_promoting_leaves_one_version_without_alias(team: Team):
    second = team.states[1]
    assert second.status == -signal.SIGKILL, second.output
    assert (second.versions, second.aliases, second.runs) == ([1], {}, 1)
    assert second.objects == team.states[0].objects


def test_the_last_run_repairs_both_without_a_stage_an_orphan_or_a_second_release(team: Team):
    last = team.states[2]
    assert last.status == 0, last.output
    assert (last.versions, last.aliases, last.runs) == ([1], {"champion": 1}, 1)
    added = last.objects.keys() - team.states[0].objects.keys()
    assert added == {"releases/a/channels/champion.json"}
    assert {key: last.objects[key] for key in team.states[0].objects} == team.states[0].objects
    assert (team.root / "distilled").read_text().split() == ["a"]
    assert "lcm-lora-a/1 @champion" in last.output
    sha256 = bundle.digest(team.root / "release/a")
    assert json.loads(team.read("team", "releases/a/channels/champion.json"))["sha256"] == sha256


def test_the_command_shows_every_field_of_the_champion(team: Team, base_folder: Path):
    shown = json.loads(team.command(sys.executable, "-m", "lcmlora", "registry", "show", CHAMPION, "--json"))
    assert shown.keys() == {each.name for each in dataclasses.fields(registry.Version)}
    sha256 = bundle.digest(team.root / "release/a")
    expected = {
        "name": "lcm-lora-a",
        "version": 1,
        "sha256": sha256,
        "gate": "passed",
        "gate_reason": None,
        "data_digest": "d" * 64,
        "release_uri": f"{TO}/a/sha256-{sha256[:12]}",
        "aliases": ["champion"],
        "features": "efficientnet-lite0",
    }
    assert {key: shown[key] for key in expected} == expected
    assert shown["base"] == {
        "source": str(base_folder),
        "revision": None,
        "digest": sha256_folder(base_folder / "unet"),
    }
    assert shown["metrics"]["efficientnet-lite0/excess.student_4"] == 4.5
    assert shown["created"] <= shown["promoted"]
    assert all(shown[key] for key in ("objective", "run_id", "created", "updated", "tags"))


def test_the_champion_is_pulled_verified_and_draws(team: Team, base_folder: Path, tmp_path: Path):
    pulled = registry.pull(CHAMPION, team.registry, tmp_path / "champion")
    bundle.verify(pulled, bundle.ADAPTER_FILES)
    assert bundle.digest(pulled) == bundle.digest(team.root / "release/a")
    pipeline = registry.load_pipeline(
        CHAMPION, "cpu", settings=team.registry, base=base_folder, cache=tmp_path / "cache"
    )
    pictures = pipeline(["owl", "fox"], seed=0)
    assert len(pictures) == 2
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_clone_with_an_empty_cache_restores_the_adapter_without_running_a_stage(team: Team, tmp_path: Path):
    team.command("git", "add", "--all", "--", ":(exclude)distilled")
    team.command("git", "commit", "--quiet", "--message", "trained")
    clone = tmp_path / "clone"
    team.command("git", "clone", "--quiet", str(team.root), str(clone))
    assert not (clone / "adapters/a").exists() and not (clone / ".dvc/cache").exists()
    said = team.command("dvc", "repro", "--pull", cwd=clone)
    assert "Running stage" not in said
    assert not (clone / "distilled").exists()
    assert bundle.digest(clone / "release/a") == bundle.digest(team.root / "release/a")
    bundle.verify(clone / "release/a")


@pytest.mark.slow
def test_no_secret_is_in_what_the_runs_printed_wrote_or_sent(team: Team):
    secrets = [PASSWORD, MLFLOW.password, PREFECT.password, *(secret for _, secret in team.s3.keys.values())]
    written = {"output": "\n".join(state.output for state in team.states).encode()}
    for folder in (team.root, team.prefect.root, team.root.with_name("prefect")):
        written |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for bucket in ("team", "mlflow"):
        written |= {f"s3://{bucket}/{key}": team.read(bucket, key) for key in team.objects(bucket)}
    sent = [request.line.encode() + request.body for request in team.relay.requests]
    written |= {f"request {number}": content for number, content in enumerate(sent)}
    logs = prefect_logs(team.prefect)
    written["Prefect's logs"] = logs.encode()
    assert "Finished in state Completed" in logs
    assert {"release/a/provenance.json", "release/a/README.md"} <= {
        str(Path(name).relative_to(team.root)) for name in written if name.startswith(str(team.root))
    }
    assert [name for name, content in written.items() if any(secret.encode() in content for secret in secrets)] == []


def prefect_logs(server: PrefectServer) -> str:
    question = urllib.request.Request(f"{server.api}/logs/filter", json.dumps({"limit": 200}).encode(), HEADERS)
    with urllib.request.urlopen(question, timeout=30) as answer:
        return "\n".join(entry["message"] for entry in json.loads(answer.read()))
