import hashlib
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.registry import promote, register, resolve, tracking
from tests.registries import fresh
from tests.releases import write_sealed

SHA = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def settings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    return fresh(tmp_path, tmp_path_factory)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_sealed(tmp_path / "bundle")


@pytest.fixture
def unreachable() -> Registry:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Registry(tracking_uri=f"http://user:sesame@127.0.0.1:{port}", experiment="lcmlora", alias="champion")


def client(settings: Registry) -> Any:
    return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)


def test_a_run_keeps_its_params_and_every_figure_at_its_step(settings: Registry):
    with tracking(settings, "mini", {"steps": 600, "nested": {"lr": 0.5}}) as run:
        for step in range(1, 4):
            run.log({"loss": 1 / step}, step)
    data = client(settings).get_run(run.id)
    assert data.info.status == "FINISHED"
    assert data.data.params == {"steps": "600", "nested.lr": "0.5"}
    history = client(settings).get_metric_history(run.id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.reference == {"run_id": run.id, "tracking_uri": settings.tracking_uri, "experiment": "lcmlora"}


def test_pictures_are_kept_with_their_step(settings: Registry, tmp_path: Path):
    with tracking(settings, "mini", {}) as run:
        for step, colour in ((100, "red"), (200, "blue")):
            run.picture("validation", Image.new("RGB", (16, 8), colour), step)
    kept = client(settings).download_artifacts(run.id, "images", str(tmp_path))
    found = {path.name: Image.open(path) for path in Path(kept).glob("*.png")}
    assert {picture.getpixel((0, 0)) for picture in found.values()} == {(255, 0, 0), (0, 0, 255)}
    assert all("validation" in name for name in found) and {picture.size for picture in found.values()} == {(16, 8)}
    assert sorted(re.findall(r"step\W(\d+)\W", " ".join(found))) == ["100", "200"]


def test_a_run_whose_body_fails_is_failed_and_keeps_what_was_logged(settings: Registry):
    with pytest.raises(ZeroDivisionError), tracking(settings, "mini", {}) as run:
        run.log({"loss": 2.0}, 1)
        run.log({"loss": 1 / 0}, 2)
    data = client(settings).get_run(run.id)
    assert data.info.status == "FAILED"
    assert data.data.metrics == {"loss": 2.0}


def test_a_resumed_distillation_continues_its_run(settings: Registry, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), tracking(settings, "mini", {"a": 1}, tmp_path) as first:
        raise KeyboardInterrupt
    assert client(settings).get_run(first.id).info.status == "KILLED"
    with tracking(settings, "mini", {"a": 1}, tmp_path) as second:
        assert client(settings).get_run(first.id).info.status == "RUNNING"
    assert second.id == first.id
    assert client(settings).get_run(first.id).info.status == "FINISHED"


def test_training_goes_on_where_mlflow_does_not_answer_and_says_so_once(unreachable: Registry, capsys):
    with tracking(unreachable, "mini", {}) as run:
        run.log({"loss": 1.0}, 1)
    assert run.id is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("warning: MLflow at http://user:***@127.0.0.1:")
    assert "training goes on without it" in said[0]
    assert "sesame" not in said[0]
    assert run.reference["tracking_uri"].startswith("http://user:***@")


def test_training_goes_on_where_mlflow_goes_away_in_the_middle(settings: Registry, tmp_path: Path, capsys):
    with tracking(settings, "mini", {}) as run:
        (tmp_path / "mlflow.db").write_bytes(b"no database any more" * 1000)
        run.log({"loss": 1.0}, 1)
    assert capsys.readouterr().err.count("warning: MLflow at") == 1


def test_without_settings_nothing_is_logged():
    with tracking(None, "mini", {}) as run:
        run.log({"loss": 1.0}, 1)
    assert run.reference == {"run_id": None, "tracking_uri": None, "experiment": None}


def test_a_release_becomes_a_version_with_artifacts_figures_and_tags(settings: Registry, bundle: Path, tmp_path: Path):
    with tracking(settings, "mini", {}) as run:
        run.log({"loss": 1.0}, 1)
    registered = register("mini", settings, bundle, run.id, "file:///releases/mini")
    assert (registered.name, registered.version, registered.created) == ("lcm-lora-mini", 1, True)
    assert (registered.sha256, registered.aliases, registered.promoted) == (SHA, (), False)
    version = client(settings).get_model_version("lcm-lora-mini", "1")
    assert version.run_id == run.id
    assert version.tags == {
        "sha256": SHA,
        "base": "bases/mini",
        "base_digest": "b" * 64,
        "data_digest": "d" * 64,
        "git_commit": "c" * 40,
        "objective": "lcm",
        "features": "efficientnet-lite0",
        "release_uri": "file:///releases/mini",
        "gate": "passed",
    }
    metrics = client(settings).get_run(run.id).data.metrics
    assert metrics["loss"] == 1.0
    assert metrics["efficientnet-lite0/excess.student_4"] == 4.5
    assert metrics["efficientnet-lite0/excess.dpmpp_2"] == 93.0
    client(settings).download_artifacts(run.id, "release", str(tmp_path / "download"))
    for path in bundle.iterdir():
        assert (tmp_path / "download/release" / path.name).read_bytes() == path.read_bytes()


def test_registering_again_finds_the_version_and_writes_nothing(settings: Registry, bundle: Path):
    register("mini", settings, bundle, None, "file:///releases/mini")
    before = client(settings).get_model_version("lcm-lora-mini", "1").last_updated_timestamp
    again = register("mini", settings, bundle, None, "file:///releases/mini")
    assert (again.version, again.created) == (1, False)
    assert len(client(settings).search_model_versions("name = 'lcm-lora-mini'")) == 1
    assert client(settings).get_model_version("lcm-lora-mini", "1").last_updated_timestamp == before
    experiment = client(settings).get_experiment_by_name("lcmlora").experiment_id
    assert len(client(settings).search_runs([experiment])) == 1


def test_registering_again_completes_the_tags_that_a_former_run_could_not_know(settings: Registry, bundle: Path):
    register("mini", settings, bundle, gate_failures=["too bad", "too slow"])
    tags = client(settings).get_model_version("lcm-lora-mini", "1").tags
    assert (tags["gate"], tags["gate_reason"]) == ("failed", "too bad; too slow")
    assert "release_uri" not in tags
    register("mini", settings, bundle, None, "s3://bucket/mini")
    tags = client(settings).get_model_version("lcm-lora-mini", "1").tags
    assert (tags["gate"], tags["gate_reason"], tags["release_uri"]) == ("passed", "", "s3://bucket/mini")


def test_a_run_that_this_server_does_not_know_is_replaced_by_a_new_one(settings: Registry, bundle: Path):
    register("mini", settings, bundle, "0123456789abcdef0123456789abcdef")
    version = client(settings).get_model_version("lcm-lora-mini", "1")
    run = client(settings).get_run(version.run_id)
    assert run.data.params == {"objective": "lcm", "steps": "600"}
    assert run.data.metrics["efficientnet-lite0/retrieval.student_4"] == 0.85


def test_other_weights_are_another_version(settings: Registry, bundle: Path, tmp_path: Path):
    register("mini", settings, bundle)
    other = register("mini", settings, write_sealed(tmp_path / "other", weights=b"better"))
    assert (other.version, other.created) == (2, True)


def test_the_alias_moves_and_a_former_champion_is_known_as_promoted(settings: Registry, bundle: Path, tmp_path: Path):
    register("mini", settings, bundle)
    register("mini", settings, write_sealed(tmp_path / "other", weights=b"better"))
    assert promote("mini", 1, settings) == "lcm-lora-mini@champion"
    assert register("mini", settings, bundle).aliases == ("champion",)
    before = client(settings).get_registered_model("lcm-lora-mini").last_updated_timestamp
    promote("mini", 1, settings)
    assert client(settings).get_registered_model("lcm-lora-mini").last_updated_timestamp == before
    promote("mini", 2, settings)
    former = register("mini", settings, bundle)
    assert (former.aliases, former.promoted) == ((), True)
    assert resolve("lcm-lora-mini@champion", settings)["version"] == 2


def test_a_version_is_resolved_by_alias_and_by_number(settings: Registry, bundle: Path):
    version = register("mini", settings, bundle, None, "s3://bucket/mini").version
    promote("mini", version, settings)
    record = resolve("lcm-lora-mini@champion", settings)
    assert record == resolve("lcm-lora-mini/1", settings)
    assert record["tags"]["sha256"] == SHA
    assert record["tags"]["release_uri"] == "s3://bucket/mini"
    assert record["aliases"] == ["champion"]
    assert record["metrics"]["efficientnet-lite0/excess.student_4"] == 4.5


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("lcm-lora-mini@nobody", "no such alias; lcm-lora-mini has none"),
        ("lcm-lora-mini/7", "not registered at sqlite"),
        ("lcm-lora-nothing@champion", "not registered at sqlite"),
        ("lcm-lora-mini", "expected MODEL@ALIAS or MODEL/VERSION"),
    ],
)
def test_what_cannot_be_resolved_is_named(reference: str, expected: str, settings: Registry, bundle: Path):
    register("mini", settings, bundle)
    with pytest.raises(UserError, match=expected) as caught:
        resolve(reference, settings)
    assert reference in str(caught.value)


def test_a_registry_that_does_not_answer_is_named_and_the_release_is_kept(unreachable: Registry, bundle: Path):
    with pytest.raises(UserError) as caught:
        register("mini", unreachable, bundle)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("MLflow at http://user:***@127.0.0.1:")
    assert line.endswith(f"the release is kept in {bundle} and the next run registers it")
    assert "sesame" not in line


def test_a_database_that_cannot_be_opened_is_told_at_once(bundle: Path):
    settings = Registry(tracking_uri="sqlite:////proc/mlflow.db", experiment="lcmlora", alias="champion")
    with pytest.raises(UserError, match=r"MLflow at sqlite:////proc/mlflow\.db: .*unable to open database file"):
        register("mini", settings, bundle)
