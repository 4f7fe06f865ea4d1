import hashlib
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image

from lcmlora.config import Registry
from lcmlora.errors import Unavailable, UserError
from lcmlora.inference.mlflow_internals import start_system_monitor
from lcmlora.io.files import sha256_file
from lcmlora.registry.downloads.pulling import figures, pull
from lcmlora.registry.listing.conditions import condition
from lcmlora.registry.listing.search import versions
from lcmlora.registry.lookup import champion, compare, resolve
from lcmlora.registry.promotion import promote_passed
from lcmlora.registry.registration import register_release
from lcmlora.registry.tracking import log_run
from lcmlora.releases.bundle import ADAPTER_FILES, verify
from tests.support.registries import fresh
from tests.support.releases import write_sealed
from tests.support.together import at_once

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


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Changes a file of a release, and its checksum with it."""
    sums = (folder / "SHA256SUMS").read_text().replace(sha256_file(folder / name), hashlib.sha256(content).hexdigest())
    if name == "pytorch_lora_weights.safetensors":
        sums = sums.replace(SHA, hashlib.sha256(content).hexdigest())
    (folder / name).write_bytes(content)
    (folder / "SHA256SUMS").write_text(sums)


def client(settings: Registry) -> Any:
    return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)


def test_mlflow_system_metrics_monitor_logs_the_machines_figures_to_a_run(settings: Registry):
    with log_run(settings, "mini", {}) as run:
        assert run.id
        monitor = start_system_monitor(run.id, settings.tracking_uri, 0.05)
        until = time.monotonic() + 30
        while not (found := client(settings).get_run(run.id).data.metrics) and time.monotonic() < until:
            time.sleep(0.05)
        monitor.finish()
    assert found["system/system_memory_usage_percentage"] > 0


def test_a_run_keeps_its_params_and_every_figure_at_its_step(settings: Registry):
    with log_run(settings, "mini", {"steps": 600, "nested": {"lr": 0.5}}) as run:
        for step in range(1, 4):
            run.log({"loss": 1 / step}, step)
    data = client(settings).get_run(run.id)
    assert data.info.status == "FINISHED"
    assert data.data.params == {"steps": "600", "nested.lr": "0.5"}
    history = client(settings).get_metric_history(run.id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_pictures_are_kept_with_their_step(settings: Registry, tmp_path: Path):
    with log_run(settings, "mini", {}) as run:
        for step, colour in ((100, "red"), (200, "blue")):
            run.picture("validation", Image.new("RGB", (16, 8), colour), step)
    kept = client(settings).download_artifacts(run.id, "images", str(tmp_path))
    found = {path.name: Image.open(path) for path in Path(kept).glob("*.png")}
    assert {picture.getpixel((0, 0)) for picture in found.values()} == {(255, 0, 0), (0, 0, 255)}
    assert all("validation" in name for name in found) and {picture.size for picture in found.values()} == {(16, 8)}
    assert sorted(re.findall(r"step\W(\d+)\W", " ".join(found))) == ["100", "200"]


def test_a_run_whose_body_fails_is_failed_and_keeps_what_was_logged(settings: Registry):
    with pytest.raises(ZeroDivisionError), log_run(settings, "mini", {}) as run:
        run.log({"loss": 2.0}, 1)
        run.log({"loss": 1 / 0}, 2)
    data = client(settings).get_run(run.id)
    assert data.info.status == "FAILED"
    assert data.data.metrics == {"loss": 2.0}


def test_a_resumed_distillation_continues_its_run(settings: Registry, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), log_run(settings, "mini", {"a": 1}, tmp_path) as first:
        raise KeyboardInterrupt
    assert client(settings).get_run(first.id).info.status == "KILLED"
    with log_run(settings, "mini", {"a": 1}, tmp_path) as second:
        assert client(settings).get_run(first.id).info.status == "RUNNING"
    assert second.id == first.id
    assert client(settings).get_run(first.id).info.status == "FINISHED"


def test_training_goes_on_where_mlflow_does_not_answer_and_says_so_once(unreachable: Registry, capsys):
    with log_run(unreachable, "mini", {}) as run:
        run.log({"loss": 1.0}, 1)
    assert run.id is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("warning: MLflow at http://user:***@127.0.0.1:")
    assert "training goes on without it" in said[0]
    assert "sesame" not in said[0]


def test_training_goes_on_where_mlflow_goes_away_in_the_middle(settings: Registry, tmp_path: Path, capsys):
    with log_run(settings, "mini", {}) as run:
        (tmp_path / "mlflow.db").write_bytes(b"no database any more" * 1000)
        run.log({"loss": 1.0}, 1)
    assert capsys.readouterr().err.count("warning: MLflow at") == 1


def test_the_run_of_a_distillation_that_mlflow_missed_a_part_of_is_the_adapters_all_the_same(
    settings: Registry, bundle: Path, tmp_path: Path, capsys
):
    database = tmp_path / "mlflow.db"
    with log_run(settings, "mini", {}) as run:
        run.log({"loss": 2.0}, 1)
        whole = database.read_bytes()
        database.write_bytes(b"no database for a while" * 1000)
        run._send()
        assert "training goes on without it" in capsys.readouterr().err
        database.write_bytes(whole)
        run.tag_adapter(SHA, {"torch": "2.13.0+cpu"})
    assert "warning" not in capsys.readouterr().err
    assert register_release("mini", settings, bundle).run_id == run.id
    assert client(settings).get_run(run.id).data.tags["torch"] == "2.13.0+cpu"


def test_of_two_distillations_that_gave_the_same_adapter_the_last_one_is_its_run(settings: Registry, bundle: Path):
    ids = []
    for _ in range(2):
        with log_run(settings, "mini", {}) as run:
            run.tag_adapter(SHA, {})
        ids.append(run.id)
        time.sleep(0.01)  # MLflow orders them by the millisecond
    assert register_release("mini", settings, bundle).run_id == ids[1]


def test_without_settings_nothing_is_logged():
    with log_run(None, "mini", {}) as run:
        run.log({"loss": 1.0}, 1)
        run.tag_adapter(SHA, {})
    assert run.id is None


def test_a_release_becomes_a_version_with_artifacts_figures_and_tags(settings: Registry, bundle: Path, tmp_path: Path):
    with log_run(settings, "mini", {}) as run:
        run.log({"loss": 1.0}, 1)
        run.tag_adapter(SHA, {"torch": "2.13.0+cpu"})
    registered = register_release("mini", settings, bundle, "file:///releases/mini")
    assert (registered.name, registered.version, registered.created) == ("lcm-lora-mini", 1, True)
    assert (registered.sha256, registered.aliases, registered.promoted) == (SHA, (), False)
    version = client(settings).get_model_version("lcm-lora-mini", "1")
    assert version.run_id == run.id
    events = {key: value for key, value in version.tags.items() if key.startswith("event.")}
    main = json.loads(version.tags["main_figures"])
    assert version.tags == events | {
        "main_figures": json.dumps(main, sort_keys=True),
        "last_event": max(events)[6:10] + "-" + max(events)[10:12] + "-" + max(events)[12:14],
        "sha256": SHA,
        "base": "bases/mini",
        "base_digest": "b" * 64,
        "data_digest": "d" * 64,
        "git_commit": "c" * 40,
        "git_dirty": "false",
        "objective": "lcm",
        "features": "efficientnet-lite0",
        "release_uri": "file:///releases/mini",
        "gate": "passed",
    }
    assert [json.loads(value)["action"] for _, value in sorted(events.items())] == ["registered", "passed"]
    metrics = client(settings).get_run(run.id).data.metrics
    assert metrics["loss"] == 1.0
    assert metrics["efficientnet-lite0/excess.student_4"] == main["excess.student_4"] == 4.5
    assert main == {key: metrics[f"efficientnet-lite0/{key}"] for key in main} and "retrieval.student_4" in main
    assert metrics["efficientnet-lite0/excess.dpmpp_2"] == 93.0
    client(settings).download_artifacts(run.id, "model", str(tmp_path))
    for path in bundle.iterdir():
        assert (tmp_path / "model/artifacts/release" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "model/MLmodel").is_file() and not list(tmp_path.rglob("*.pkl"))
    (data,) = client(settings).get_run(run.id).inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("data/pictures", "d" * 36)
    client(settings).download_artifacts(run.id, "preview.png", str(tmp_path))
    assert Image.open(tmp_path / "preview.png").size == (800, 400)
    assert "preview.png" in version.description and "| student@4 | 4 | 4.5 | 0.850 |" in version.description


def test_registering_again_finds_the_version_and_writes_nothing(settings: Registry, bundle: Path):
    register_release("mini", settings, bundle, "file:///releases/mini")
    before = client(settings).get_model_version("lcm-lora-mini", "1").last_updated_timestamp
    again = register_release("mini", settings, bundle, "file:///releases/mini")
    assert (again.version, again.created) == (1, False)
    assert len(client(settings).search_model_versions("name = 'lcm-lora-mini'")) == 1
    assert client(settings).get_model_version("lcm-lora-mini", "1").last_updated_timestamp == before
    experiment = client(settings).get_experiment_by_name("lcmlora").experiment_id
    assert len(client(settings).search_runs([experiment])) == 1


def test_registering_again_completes_the_tags_that_a_former_run_could_not_know(settings: Registry, bundle: Path):
    register_release("mini", settings, bundle, gate_failures=["too bad", "too slow"])
    tags = client(settings).get_model_version("lcm-lora-mini", "1").tags
    assert (tags["gate"], tags["gate_reason"]) == ("rejected", "too bad; too slow")
    assert "release_uri" not in tags
    register_release("mini", settings, bundle, "s3://bucket/mini")
    tags = client(settings).get_model_version("lcm-lora-mini", "1").tags
    assert (tags["gate"], tags["gate_reason"], tags["release_uri"]) == ("passed", "", "s3://bucket/mini")


def test_an_adapter_whose_distillation_this_server_does_not_know_gets_a_new_run(settings: Registry, bundle: Path):
    with log_run(settings, "mini", {}) as run:
        run.tag_adapter("0" * 64, {})
    register_release("mini", settings, bundle)
    version = client(settings).get_model_version("lcm-lora-mini", "1")
    assert version.run_id != run.id
    run = client(settings).get_run(version.run_id)
    assert run.info.status == "FINISHED"
    gate = {"gate.steps": "4", "gate.min_retrieval": "0.8"}
    assert run.data.params == {"objective": "lcm", "steps": "600"} | gate
    assert run.data.tags["sha256"] == SHA
    assert run.data.metrics["efficientnet-lite0/retrieval.student_4"] == 0.85


def test_other_weights_are_another_version(settings: Registry, bundle: Path, tmp_path: Path):
    register_release("mini", settings, bundle)
    other = register_release("mini", settings, write_sealed(tmp_path / "other", weights=b"better"))
    assert (other.version, other.created) == (2, True)


def test_a_version_is_resolved_by_alias_by_number_and_by_digest(settings: Registry, bundle: Path):
    registered = register_release("mini", settings, bundle, "s3://bucket/mini")
    assert champion("mini", settings) is None
    promote_passed(registered, settings, reason="first")
    version = resolve("lcm-lora-mini@champion", settings)
    assert version == resolve("lcm-lora-mini/1", settings) == resolve(SHA, settings) == resolve(SHA[:12], settings)
    assert version == resolve("models:/lcm-lora-mini@champion", settings) == champion("mini", settings)
    assert (version.sha256, version.release_uri, version.aliases) == (SHA, "s3://bucket/mini", ("champion",))
    assert version.base == {"source": "bases/mini", "revision": None, "digest": "b" * 64}
    assert (version.objective, version.data_digest, version.git_commit) == ("lcm", "d" * 64, "c" * 40)
    assert version.metrics["efficientnet-lite0/excess.student_4"] == version.figure("excess.student_4") == 4.5
    assert version.promoted is not None and version.created[:19] <= min(version.promoted, version.updated)[:19]
    assert json.loads(json.dumps(version.plain()))["run_id"] == version.run_id


def test_a_version_is_found_by_the_digest_of_the_trained_adapter_and_its_run_keeps_that_digest(
    settings: Registry, bundle: Path, tmp_path: Path
):
    trained = "a" * 64
    register_release("mini", settings, bundle)
    with log_run(settings, "mini", {}) as run:
        run.tag_adapter(trained, {})
    released = write_sealed(tmp_path / "released", weights=b"in kohya's spelling", adapter=trained)
    registered = register_release("mini", settings, released)
    assert registered.run_id == run.id and registered.version == 2
    version = resolve(trained[:12], settings)
    assert version == resolve(trained, settings) == resolve(registered.sha256, settings)
    assert (version.trained, version.sha256) == (trained, sha256_file(released / "pytorch_lora_weights.safetensors"))
    assert client(settings).get_run(run.id).data.tags["sha256"] == trained
    first = resolve("lcm-lora-mini/1", settings)
    assert first.trained == first.sha256 == SHA


def test_versions_are_listed_with_their_aliases_and_searched_by_tag_and_figure(
    settings: Registry, bundle: Path, tmp_path: Path
):
    register_release("mini", settings, bundle)
    other = register_release("mini", settings, write_sealed(tmp_path / "other", weights=b"better"))
    register_release("other", settings, write_sealed(tmp_path / "third", weights=b"third"), gate_failures=["too bad"])
    promote_passed(other, settings, reason="better")
    listed = [(v.reference, v.aliases, v.gate) for v in versions(settings)]
    assert listed == [
        ("lcm-lora-mini/2", ("champion",), "passed"),
        ("lcm-lora-mini/1", (), "passed"),
        ("lcm-lora-other/1", (), "rejected"),
    ]
    assert [v.version for v in versions(settings, "lcm-lora-mini")] == [2, 1]

    def found(*conditions: str) -> list[str]:
        return [v.reference for v in versions(settings) if all(condition(text)(v) for text in conditions)]

    assert found("gate=rejected") == ["lcm-lora-other/1"]
    assert found(f"sha256={SHA}", "objective=lcm") == ["lcm-lora-mini/1"]
    assert len(found("excess.student_4<4.6")) == 3 and found("excess.student_4>4.6") == found("nothing<1") == []
    for text, message in (("objective", "expected KEY=VALUE"), ("excess<low", "'low' is not a number")):
        with pytest.raises(UserError, match=message):
            condition(text)
    with pytest.raises(UserError, match="lcm-lora-none: not registered"):
        versions(settings, "lcm-lora-none")


def test_two_versions_are_compared_figure_by_figure(settings: Registry, bundle: Path, tmp_path: Path):
    register_release("mini", settings, bundle)
    other = write_sealed(tmp_path / "other", weights=b"better")
    changed = json.loads((other / "metrics.json").read_text())
    changed["excess"]["student@4"] = 3.0
    rewrite(other, "metrics.json", json.dumps(changed).encode())
    register_release("mini", settings, other)
    rows = {row.figure: row for row in compare(*(resolve(f"lcm-lora-mini/{n}", settings) for n in (1, 2)))}
    row = rows["efficientnet-lite0/excess.student_4"]
    assert (row.first, row.second, row.change) == (4.5, 3.0, -1.5)
    assert rows["sha256"].first == SHA != rows["sha256"].second and rows["sha256"].change is None
    assert rows["base digest"].first == rows["base digest"].second == "b" * 64
    assert figures(resolve("lcm-lora-mini/2", settings), settings).plain() == changed


def test_pulling_writes_the_adapter_alone_and_only_if_it_is_the_registered_one(
    settings: Registry, bundle: Path, tmp_path: Path
):
    register_release("mini", settings, bundle)
    out = pull("lcm-lora-mini/1", settings, tmp_path / "out")
    names = ["SHA256SUMS", "provenance.json", "pytorch_lora_weights.safetensors", "scheduler_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert pull("lcm-lora-mini/1", settings, out) == out
    whole = pull("lcm-lora-mini/1", settings, tmp_path / "whole", everything=True)
    assert {path.name for path in whole.iterdir()} == {path.name for path in bundle.iterdir()}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(UserError, match="taken: exists"):
        pull("lcm-lora-mini/1", settings, tmp_path / "taken")

    stored = next((tmp_path / "mlruns").rglob("pytorch_lora_weights.safetensors"))
    stored.write_bytes(b"weightS")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: expected sha256 9a129038d9a0"):
        pull("lcm-lora-mini/1", settings, tmp_path / "damaged")
    rewrite(stored.parent, stored.name, b"weightS")  # its checksums agree with it, the registry does not
    with pytest.raises(UserError, match=r"weights\.safetensors has sha256 .*, the registry says 9a129038d9a0"):
        pull("lcm-lora-mini/1", settings, tmp_path / "damaged")
    stored.unlink()
    with pytest.raises(UserError, match=r"lcm-lora-mini/1: has no pytorch_lora_weights\.safetensors"):
        pull("lcm-lora-mini/1", settings, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists() and not list(tmp_path.glob(".damaged*"))


def _pulled(settings: Registry, out: Path) -> int:
    pull("lcm-lora-mini/1", settings, out)
    verify(out, ADAPTER_FILES)
    return len(list(out.iterdir()))


@pytest.mark.slow  # each process imports all of MLflow
def test_of_twelve_processes_that_pull_a_version_into_one_cache_all_have_it_whole(
    settings: Registry, bundle: Path, tmp_path: Path
):
    register_release("mini", settings, bundle)
    cache = tmp_path / "cache" / "mini"
    assert at_once(_pulled, settings, cache) == [4] * 12
    assert [path.name for path in cache.parent.iterdir()] == ["mini"]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("lcm-lora-mini@nobody", "no such alias; lcm-lora-mini has none"),
        ("lcm-lora-mini/7", "not registered at sqlite"),
        ("lcm-lora-nothing@champion", "not registered at sqlite"),
        ("lcm-lora-mini", "expected MODEL@ALIAS, MODEL/VERSION or the SHA-256"),
        ("0123456789ab", "no adapter of this SHA-256"),
    ],
)
def test_what_cannot_be_resolved_is_named(reference: str, expected: str, settings: Registry, bundle: Path):
    register_release("mini", settings, bundle)
    with pytest.raises(UserError, match=expected) as caught:
        resolve(reference, settings)
    assert reference in str(caught.value)


def test_a_registry_that_does_not_answer_is_named_and_the_release_is_kept(unreachable: Registry, bundle: Path):
    with pytest.raises(Unavailable) as caught:
        register_release("mini", unreachable, bundle)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("MLflow at http://user:***@127.0.0.1:")
    assert line.endswith(f"the release is kept in {bundle} and the next run registers it")
    assert "sesame" not in line


def test_a_database_that_cannot_be_opened_is_told_at_once(bundle: Path):
    settings = Registry(tracking_uri="sqlite:////proc/mlflow.db", experiment="lcmlora", alias="champion")
    with pytest.raises(UserError, match=r"MLflow at sqlite:////proc/mlflow\.db: .*unable to open database file"):
        register_release("mini", settings, bundle)
