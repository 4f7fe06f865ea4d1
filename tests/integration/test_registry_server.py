"""The registry on an MLflow server with PostgreSQL behind it and artifacts in a bucket."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcmlora import registry
from lcmlora.adapters.metadata import WEIGHTS
from lcmlora.config import Registry
from lcmlora.diffusion import sampling
from lcmlora.errors import UserError
from lcmlora.inference import pipelines
from lcmlora.io.files import sha256_file
from lcmlora.registry import promotion, registration
from lcmlora.registry.lookup import Version
from lcmlora.registry.servers import moving
from lcmlora.registry.tracking import log_run
from lcmlora.releases import bundle
from tests.integration.relay import Relay
from tests.integration.seaweed import SeaweedFS
from tests.integration.tracking_servers import PASSWORD, MLflow, PostgreSQL
from tests.support import served
from tests.support.miniature import RESOLUTION
from tests.support.releases import load_settings, write_sealed

pytestmark = pytest.mark.integration

NAME = "lcm-lora-mini"
FIGURE = "efficientnet-lite0/excess.student_4"


@pytest.fixture(scope="module")
def relay(mlflow_server: MLflow) -> Iterator[Relay]:
    with Relay(mlflow_server.port) as relay:
        yield relay


@pytest.fixture(autouse=True, scope="module")
def no_way_to_the_bucket_but_through_the_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def settings(relay: Relay, request: pytest.FixtureRequest) -> Registry:
    """The server, with an experiment of the test's own."""
    return Registry(tracking_uri=relay.uri, experiment=request.node.name, alias="champion")


@pytest.fixture
def sealed(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A release whose adapter, and so whose SHA-256, no other test has."""
    return write_sealed(tmp_path / "release", weights=request.node.name.encode())


@dataclass(frozen=True)
class Shelf:
    """A model with a champion that was rolled back to, the one after it, and a rejected one."""

    settings: Registry
    folders: tuple[Path, ...]  # of versions 1 to 3
    run_id: str  # of version 1


@pytest.fixture(scope="module")
def shelf(relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    root = tmp_path_factory.mktemp("shelf")
    settings = Registry(tracking_uri=relay.uri, experiment="shelf", alias="champion")
    gate = load_settings(root).gate
    folders = tuple(write_sealed(root / name, weights=name.encode()) for name in ("first", "second", "third"))
    with log_run(settings, "mini", {"steps": 600}) as run:
        run.log({"loss": 0.5}, 1)
        run.tag_adapter(sha256_file(folders[0] / WEIGHTS), {})
    assert run.id
    registration.register_release("mini", settings, folders[0], "s3://bucket/team/mini")
    registration.register_release("mini", settings, folders[1])
    registration.register_release("mini", settings, folders[2], gate_failures=["too bad"])
    promotion.promote(f"{NAME}/1", settings, gate, reason="the first one", who="ada")
    promotion.promote(f"{NAME}/2", settings, gate, reason="better", who="bob")
    promotion.rollback(NAME, settings, reason="complaints", who="cleo")
    return Shelf(settings, folders, run.id)


def client(settings: Registry) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)


def runs(settings: Registry) -> list[Any]:
    found = client(settings).get_experiment_by_name(settings.experiment)
    return list(client(settings).search_runs([found.experiment_id]))


def keys(s3: SeaweedFS, run_id: str) -> dict[str, str]:
    """Returns name -> key of the objects that MLflow keeps for the release of a run."""
    found: dict[str, str] = {}
    for page in s3.client().get_paginator("list_objects_v2").paginate(Bucket="mlflow"):
        listed = [entry["Key"] for entry in page.get("Contents", [])]
        found |= {Path(key).name: key for key in listed if run_id in key and "/release/" in key}
    return found


def read(s3: SeaweedFS, key: str) -> bytes:
    return bytes(s3.client().get_object(Bucket="mlflow", Key=key)["Body"].read())


def test_a_release_has_its_tags_figures_data_set_and_report_on_the_server(shelf: Shelf, s3: SeaweedFS):
    version = client(shelf.settings).get_model_version(NAME, "1")
    expected = {
        "sha256": bundle.digest(shelf.folders[0]),
        "base": "bases/mini",
        "base_digest": "b" * 64,
        "data_digest": "d" * 64,
        "git_commit": "c" * 40,
        "objective": "lcm",
        "features": "efficientnet-lite0",
        "release_uri": "s3://bucket/team/mini",
        "gate": "passed",
    }
    assert expected.items() <= version.tags.items()
    assert version.run_id == shelf.run_id
    kept = client(shelf.settings).get_run(shelf.run_id)
    assert kept.data.params["steps"] == "600"
    assert kept.data.metrics["loss"] == 0.5
    assert kept.data.metrics[FIGURE] == 4.5
    data = [found.dataset for found in kept.inputs.dataset_inputs]
    assert [(each.name, each.digest) for each in data] == [("data/pictures", "d" * 36)]
    stored = keys(s3, shelf.run_id)
    for path in shelf.folders[0].iterdir():
        assert read(s3, stored[path.name]) == path.read_bytes()


def test_a_version_is_found_by_alias_number_and_sha256_and_listed_with_its_aliases(
    shelf: Shelf, postgresql: PostgreSQL
):
    sha256 = bundle.digest(shelf.folders[0])
    champion = registry.resolve(f"{NAME}@champion", shelf.settings)
    for reference in (f"{NAME}/1", sha256, sha256[:12]):
        assert registry.resolve(reference, shelf.settings) == champion
    assert (champion.version, champion.sha256, champion.aliases) == (1, sha256, ("champion",))
    assert (champion.base["digest"], champion.data_digest) == ("b" * 64, "d" * 64)
    assert (champion.release_uri, champion.gate) == ("s3://bucket/team/mini", "passed")
    assert champion.metrics[FIGURE] == 4.5
    listed = registry.versions(shelf.settings, NAME)
    assert [(version.version, version.aliases) for version in listed] == [(3, ()), (2, ()), (1, ("champion",))]
    directly = shelf.settings.model_copy(update={"tracking_uri": postgresql.uri("mlflow")})
    assert registry.versions(directly, NAME) == listed
    with pytest.raises(UserError, match=f"{NAME}@nobody: no such alias; {NAME} has champion"):
        registry.resolve(f"{NAME}@nobody", shelf.settings)


def test_promotions_and_the_way_back_are_a_history_in_order(shelf: Shelf):
    events = promotion.history(NAME, shelf.settings)
    assert [(event.action, event.version) for event in events[:6]] == [
        *(("registered", 1), ("passed", 1), ("registered", 2), ("passed", 2)),
        *(("registered", 3), ("rejected", 3)),
    ]
    assert [(event.action, event.version, event.former, event.who, event.reason) for event in events[6:]] == [
        ("promoted", 1, None, "ada", "the first one"),
        ("promoted", 2, 1, "bob", "better"),
        ("rolled back", 1, 2, "cleo", "complaints"),
    ]
    assert [event.time for event in events] == sorted(event.time for event in events)


def test_versions_and_runs_are_found_by_tag_and_by_figure(shelf: Shelf):
    search = client(shelf.settings).search_model_versions
    passed, rejected = (search(f"name = '{NAME}' and tags.gate = '{gate}'") for gate in ("passed", "rejected"))
    assert sorted(int(version.version) for version in passed) == [1, 2]
    assert [int(version.version) for version in rejected] == [3]
    experiment = client(shelf.settings).get_experiment_by_name("shelf").experiment_id
    for condition, expected in (("< 5", 3), ("< 4", 0)):
        assert len(client(shelf.settings).search_runs([experiment], f"metrics.`{FIGURE}` {condition}")) == expected
    both = client(shelf.settings).search_runs([experiment], f"metrics.`{FIGURE}` < 5 and tags.gate = 'rejected'")
    assert [run.info.run_id for run in both] == [rejected[0].run_id]


@pytest.mark.slow
def test_mlflows_own_loader_of_adapters_loads_a_version_from_the_server(
    settings: Registry, miniatures: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import mlflow
    from diffusers import LCMScheduler

    released = served.package(miniatures("sd15"), tmp_path)
    version = registration.register_release("flavour", settings, released)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri)
    (tmp_path / "loaded").mkdir()
    uri = f"models:/lcm-lora-flavour/{version.version}"
    adapter = mlflow.diffusers.load_model(uri, dst_path=str(tmp_path / "loaded"))
    assert sha256_file(Path(adapter.adapter_path) / WEIGHTS) == version.sha256
    pipeline = adapter.load_pipeline(base_model=str(miniatures("sd15")), device="cpu")
    pipeline.scheduler = LCMScheduler.from_pretrained(adapter.adapter_path)
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": RESOLUTION, "height": RESOLUTION}
    noise = sampling.initial_noise((4, 8, 8), 3, [0])
    drawn = pipeline("tree", num_inference_steps=1, guidance_scale=1.0, latents=noise, **size).images[0]
    (expected,) = pipelines.load(released, warm=False)("tree", steps=1, seed=3)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_runs_of_registered_adapters_are_finished(shelf: Shelf):
    assert {run.info.status for run in runs(shelf.settings)} == {"FINISHED"}


def test_an_adapter_is_pulled_through_the_server_and_one_flipped_byte_in_the_bucket_is_refused(
    shelf: Shelf, s3: SeaweedFS, tmp_path: Path
):
    pulled = registry.pull(f"{NAME}@champion", shelf.settings, tmp_path / "pulled")
    assert {path.name for path in pulled.iterdir()} == set(bundle.ADAPTER_FILES)
    for name in bundle.ADAPTER_FILES:
        assert (pulled / name).read_bytes() == (shelf.folders[0] / name).read_bytes()
    whole = registry.pull(f"{NAME}@champion", shelf.settings, tmp_path / "whole", everything=True)
    assert {path.name for path in whole.iterdir()} == {path.name for path in shelf.folders[0].iterdir()}

    second = registry.resolve(f"{NAME}/2", shelf.settings)
    content = bytearray((shelf.folders[1] / bundle.WEIGHTS).read_bytes())
    content[3] ^= 1
    s3.client().put_object(Bucket="mlflow", Key=keys(s3, second.run_id)[bundle.WEIGHTS], Body=bytes(content))
    with pytest.raises(UserError, match=bundle.WEIGHTS) as caught:
        registry.pull(f"{NAME}/2", shelf.settings, tmp_path / "flipped")
    assert second.sha256[:12] in str(caught.value)
    assert hashlib.sha256(content).hexdigest()[:12] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "flipped").exists()


@pytest.fixture(scope="module")
def elsewhere() -> Any:
    """Makes processes of their own, with the environment of now, which a fork server has from its own start."""
    return multiprocessing.get_context("spawn")


@pytest.mark.slow
def test_two_processes_that_register_one_adapter_at_the_same_moment_leave_one_version(
    settings: Registry, sealed: Path, elsewhere: Any
):
    processes = [
        elsewhere.Process(target=registration.register_release, args=("twice", settings, sealed)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [version.sha256 for version in versions(settings, "lcm-lora-twice")] == [bundle.digest(sealed)]
    assert len(runs(settings)) == 1


def versions(settings: Registry, name: str) -> list[Version]:
    """Returns none, too, where there is no such model."""
    return [version for version in registry.versions(settings) if version.name == name]


@pytest.mark.slow
def test_what_a_plain_run_made_is_refused_behind_a_server_until_it_is_moved_there(
    settings: Registry, sealed: Path, postgresql: PostgreSQL, tmp_path: Path
):
    database = postgresql.uri("mlflow")
    plain = settings.model_copy(update={"tracking_uri": database})
    client(plain).create_experiment(settings.experiment, artifact_location=str(tmp_path / "mlruns/of me"))
    registration.register_release("plain", plain, sealed)
    other = write_sealed(tmp_path / "other", weights=b"another adapter of a plain experiment")
    for folder in (sealed, other):
        with pytest.raises(
            UserError, match=r"keeps its artifacts in .*mlruns/of me.*, which only one machine can read"
        ):
            registration.register_release("plain", settings, folder)
    assert [version.version for version in versions(settings, "lcm-lora-plain")] == [1]
    assert moving.move_artifacts(database, settings, tmp_path) == 1
    shutil.rmtree(tmp_path / "mlruns")
    pulled = registry.pull("lcm-lora-plain/1", settings, tmp_path / "pulled", everything=True)
    assert {path.name: path.read_bytes() for path in pulled.iterdir()} == {
        path.name: path.read_bytes() for path in sealed.iterdir()
    }
    assert not registration.register_release("plain", settings, sealed).created
    assert registration.register_release("plain", settings, other).version == 2
    assert moving.move_artifacts(database, settings, tmp_path) == 0


@pytest.mark.slow
def test_a_process_killed_while_it_uploads_leaves_no_orphan_to_the_next_one(
    settings: Registry, sealed: Path, relay: Relay, elsewhere: Any
):
    process = elsewhere.Process(target=registration.register_release, args=("killed", settings, sealed))
    relay.at("PUT .*/release/", lambda: os.kill(process.pid, signal.SIGKILL))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert versions(settings, "lcm-lora-killed") == []
    assert registration.register_release("killed", settings, sealed).created
    assert [version.sha256 for version in versions(settings, "lcm-lora-killed")] == [bundle.digest(sealed)]
    assert len(runs(settings)) == 1


@pytest.mark.slow
def test_mlflow_killed_at_registration_is_told_in_one_line_and_the_next_one_makes_one_version(
    settings: Registry, sealed: Path, relay: Relay, mlflow_server: MLflow
):
    relay.at("PUT .*/release/", mlflow_server.kill)
    with pytest.raises(UserError) as caught:
        registration.register_release("down", settings, sealed)
    assert str(caught.value).startswith(f"MLflow at {relay.uri}: ")
    assert str(caught.value).endswith(f"the release is kept in {sealed} and the next run registers it")
    assert "\n" not in str(caught.value)
    bundle.verify(sealed)
    mlflow_server.start()
    registered = registration.register_release("down", settings, sealed)
    assert (registered.version, registered.created) == (1, True)
    assert not registration.register_release("down", settings, sealed).created
    assert [version.sha256 for version in versions(settings, "lcm-lora-down")] == [bundle.digest(sealed)]
    assert len(runs(settings)) == 1


def test_a_wrong_database_password_is_refused_without_being_told(
    settings: Registry, sealed: Path, postgresql: PostgreSQL
):
    wrong = postgresql.uri("mlflow", "MARKED-WRONG-%40-SECRET")
    directly = settings.model_copy(update={"tracking_uri": wrong})
    began = time.monotonic()
    with pytest.raises(UserError, match="password authentication failed") as caught:
        registration.register_release("secret", directly, sealed)
    assert "MARKED" not in f"{caught.value}{caught.value.__cause__}"
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30  # MLflow itself tries for 100 seconds


def test_no_password_and_no_secret_went_to_the_server_to_its_tables_or_to_the_bucket(
    shelf: Shelf, s3: SeaweedFS, postgresql: PostgreSQL, relay: Relay
):
    directly = shelf.settings.model_copy(update={"tracking_uri": postgresql.uri("mlflow"), "experiment": "directly"})
    with log_run(directly, "secret", {"steps": 600}) as run:
        run.log({"loss": 0.5}, 1)
    assert run.id
    assert len(relay.requests) > 200
    said = b"\n".join(request.line.encode() + request.body for request in relay.requests)
    said += "\n".join(postgresql.rows("mlflow")).encode()
    assert b"too bad" in said
    run_ids = [found.info.run_id for found in runs(shelf.settings)]
    said += b"\n".join(read(s3, key) for run_id in run_ids for key in keys(s3, run_id).values())
    assert [
        secret for secret in (PASSWORD, *(secret for _, secret in s3.keys.values())) if secret.encode() in said
    ] == []
