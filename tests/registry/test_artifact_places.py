"""Where artifacts and releases lie: what only one machine can read is no place for a registry of several."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lcmlora import registry
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.registry.registration import register_release
from lcmlora.registry.servers import artifacts, terminal
from lcmlora.registry.tracking import connect, log_run
from tests.support.registries import fresh
from tests.support.releases import write_sealed

SERVER = Registry(tracking_uri="http://mlflow.example.org")


@pytest.fixture
def settings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    return fresh(tmp_path, tmp_path_factory)


@pytest.mark.parametrize("uri", ["/home/me/mlruns/1", "file:///home/me/mlruns/1", "./mlruns/1", "mlruns"])
def test_a_folder_of_one_machine_is_refused_behind_a_server_by_name(uri: str):
    with pytest.raises(
        UserError, match=r"http://mlflow\.example\.org: experiment shop keeps its artifacts in .*mlruns"
    ):
        artifacts.check_place(uri, SERVER, "experiment shop")
    artifacts.check_place(uri, Registry(), "experiment shop")


@pytest.mark.parametrize(
    "uri", ["s3://bucket/mlflow/1", "gs://bucket/1", "mlflow-artifacts:/1", "dbfs:/1", "wasbs://a@b/c"]
)
def test_a_place_that_others_can_read_is_taken(uri: str):
    artifacts.check_place(uri, SERVER, "experiment shop")


def test_what_a_server_keeps_cannot_be_had_by_its_database_which_is_said(settings: Registry, capsys):
    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    client.create_experiment("lcmlora", artifact_location="mlflow-artifacts:/1")
    with pytest.raises(
        UserError, match=r"experiment lcmlora keeps its artifacts on an MLflow server.*MLFLOW_TRACKING_URI"
    ):
        register_release("mini", settings, write_sealed(Path("release")))
    assert registry.versions(settings) == []
    with log_run(settings, "mini", {}) as run:
        assert run.id is None
    assert "training goes on without it" in capsys.readouterr().err


def test_an_upload_of_which_the_server_lists_less_makes_no_version(settings: Registry, monkeypatch: pytest.MonkeyPatch):
    folder = write_sealed(Path("release"))
    upload = MlflowClient.log_artifacts

    def losing(self: MlflowClient, run_id: str, local: str, artifact_path: str | None = None) -> None:
        upload(self, run_id, local, artifact_path)
        if "release" in (artifact_path or ""):
            next(Path("mlruns").rglob("README.md")).unlink()

    monkeypatch.setattr(MlflowClient, "log_artifacts", losing)
    with pytest.raises(UserError, match=r"README\.md: expected 5 bytes among its artifacts, MLflow lists nothing"):
        register_release("mini", settings, folder)
    assert registry.versions(settings) == []


def test_a_release_of_a_shared_store_is_not_said_to_be_on_this_machine(settings: Registry, capsys):
    folder = write_sealed(Path("release"))

    def uri(given: str | None) -> str | None:
        register_release("mini", settings, folder, given)
        return registry.versions(settings)[0].release_uri

    local = Path("releases/mini/sha256-x").absolute().as_uri()
    assert uri(local) == local
    assert uri("s3://team/releases/mini/sha256-x") == "s3://team/releases/mini/sha256-x"
    assert uri(local) == "s3://team/releases/mini/sha256-x"
    assert "its release stays s3://team/releases/mini/sha256-x" in capsys.readouterr().err
    assert uri(None) == "s3://team/releases/mini/sha256-x"
    assert uri("s3://other/releases/mini/sha256-x") == "s3://other/releases/mini/sha256-x"


def write_state(root: Path, port: int, pid: int) -> None:
    (root / ".up").mkdir(exist_ok=True)
    exported = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    (root / ".up/state.json").write_text(json.dumps({"exported": exported, "started": {"mlflow": {"pid": pid}}}))


def test_a_terminal_that_does_not_know_the_servers_of_up_says_so(settings: Registry, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        write_state(tmp_path, port, os.getpid())
        with pytest.raises(UserError, match=r"\.up: the servers of `lcmlora up` run, and this terminal .*`source "):
            connect(settings)
        with pytest.raises(UserError, match="this terminal does not know them"):
            registry.versions(settings)
        terminal.require_environment(Registry(tracking_uri=f"http://127.0.0.1:{port}"))
        write_state(tmp_path, port, 2**22 + 1)  # a process that does not exist: its port is another program's now
        assert registry.versions(settings) == []
    write_state(tmp_path, port, os.getpid())  # nothing listens: they were ended
    assert registry.versions(settings) == []
