"""Adapters, as people name them: every form, with a real MLflow database and a real store."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcmlora import config as settings
from lcmlora.adapters.metadata import Sampler
from lcmlora.config import Config
from lcmlora.errors import NotFound, Unavailable, UserError
from lcmlora.project import Project
from lcmlora.registry import references
from lcmlora.registry.promotion import promote_passed
from lcmlora.registry.references import Places, open_adapter
from lcmlora.registry.registration import register_release
from lcmlora.releases import catalog, publish
from lcmlora.releases.bundle import ADAPTER_FILES, SCHEDULER, WEIGHTS, digest, verify
from tests.support import releases
from tests.support.registries import fresh

SHA = "60a5d3e4"  # of b"weights"


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The shipped params.yaml in an empty folder, with an MLflow database of its own."""
    monkeypatch.chdir(tmp_path)
    raw = releases.settings(tmp_path / "base", registry=fresh(tmp_path, tmp_path_factory).model_dump())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    return settings.load(tmp_path / "params.yaml")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return releases.write_sealed(tmp_path / "bundle")


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_release_says_how_it_is_drawn_with_and_what_base_it_was_made_for(bundle: Path, tmp_path: Path):
    found = open_adapter(str(bundle), Places(tmp_path / "cache"))
    assert found.weights == bundle / WEIGHTS
    assert (found.model, found.base) == ("mini", {"source": "bases/mini", "revision": None, "digest": "b" * 64})
    # This one was packaged before provenance had a sampler.
    assert found.sampler == Sampler("LCMScheduler", None, 50)


@pytest.mark.parametrize(
    ("objective", "scheduler", "gamma"),
    [
        ("lcm", "LCMScheduler", None),
        ("tcd", "TCDScheduler", 0.3),
        ("tdd", "TCDScheduler", 0.3),
        ("pcm", "TCDScheduler", 0),
    ],
)
def test_an_older_folders_sampler_follows_from_its_scheduler_and_objective(
    tmp_path: Path, objective: str, scheduler: str, gamma: float | None
):
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    facts = {"base": {}, "distill": {"objective": objective, "gamma": 0.3}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    steps = {"_class_name": scheduler, "original_inference_steps": 20}
    (tmp_path / SCHEDULER).write_text(json.dumps(steps))
    assert open_adapter(str(tmp_path), Places(tmp_path)).sampler == Sampler(scheduler, gamma, 20)
    _change(tmp_path / "config.json", sampler={"scheduler": scheduler, "gamma": 0.1, "grid": 50})
    assert open_adapter(str(tmp_path), Places(tmp_path)).sampler == Sampler(scheduler, 0.1, 50)


def test_a_file_is_described_by_what_lies_beside_it_only_where_that_is_about_it(bundle: Path, tmp_path: Path):
    (bundle / "SHA256SUMS").unlink()
    _change(bundle / "provenance.json", kohya={"file": "lcm-lora-mini.safetensors"})
    for name in ("lcm-lora-mini.safetensors", "stranger.safetensors"):
        shutil.copy(bundle / WEIGHTS, bundle / name)
    ours, kohya, other = (
        open_adapter(str(bundle / name), Places(tmp_path))
        for name in (WEIGHTS, "lcm-lora-mini.safetensors", "stranger.safetensors")
    )
    assert ours.model == kohya.model == "mini"
    assert (kohya.weights.name, other.weights.name) == ("lcm-lora-mini.safetensors", "stranger.safetensors")
    assert (other.model, other.base, other.sampler) == (None, None, None)


def test_a_damaged_release_and_a_name_of_nothing_are_refused(bundle: Path, tmp_path: Path):
    (bundle / WEIGHTS).write_bytes(b"weightS")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: expected sha256"):
        open_adapter(str(bundle), Places(tmp_path))
    with pytest.raises(UserError, match=r"nothing: no such adapter; tried: no file or folder of this name; no project"):
        open_adapter("nothing", Places(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: no such file; .*empty is not the folder"):
        open_adapter(str(tmp_path / "empty"), Places(tmp_path))


@pytest.fixture
def places(config: Config, tmp_path: Path) -> Places:
    """Those of the project, with a store in a directory, and downloads in `cache`."""
    return Places(tmp_path / "cache", config.registry, settings.Publish(to=str(tmp_path / "store")), Project())


@pytest.fixture
def champion(places: Places, bundle: Path) -> str:
    """Publishes and registers the bundle, makes it champion, and returns its SHA-256."""
    assert places.registry and places.publish
    uri = publish.publish_release(bundle, "mini", places.publish)
    promote_passed(register_release("mini", places.registry, bundle, uri), places.registry, reason="first")
    publish.point_channel("mini", digest(bundle), places.publish)
    return digest(bundle)


def test_every_form_names_the_same_adapter(places: Places, bundle: Path, champion: str, tmp_path: Path):
    assert places.publish
    shutil.copytree(bundle, tmp_path / "adapters" / "mini")
    release = f"{places.publish.to}/mini/sha256-{champion[:12]}"
    forms = ["bundle", f"bundle/{WEIGHTS}", "mini", "mini@champion", "lcm-lora-mini@champion", "mini/1"]
    forms += ["models:/lcm-lora-mini@champion", "models:/lcm-lora-mini/1", champion, champion[:12]]
    forms += [f"mini/sha256-{champion[:12]}", release, Path(release).as_uri()]
    forms += [Path(release).parent.joinpath("channels/champion.json").as_uri()]
    for form in forms:
        found = open_adapter(form, places)
        assert (found.shown, found.model) == (form, "mini"), form
        assert digest(found.weights.parent) == champion
        version = references.find_version(form, places)
        assert (version.reference, version.sha256) == ("lcm-lora-mini/1", champion), form
        if form not in ("bundle", f"bundle/{WEIGHTS}", "mini"):
            verify(found.weights.parent, ADAPTER_FILES)
        address = catalog.find_release(references.find_release(form, places), places.publish)
        assert address == (Path(release).as_uri(), champion), form
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {f"sha256-{champion[:12]}", "versions"}


def test_the_whole_release_is_downloaded_where_more_than_the_weights_is_asked_for(places: Places, champion: str):
    for form in ("mini@champion", f"mini/sha256-{champion[:12]}"):
        folder = open_adapter(form, places, everything=True).weights.parent
        assert folder.name == f"sha256-{champion[:12]}-all" and (folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            "nobody",
            r"nobody: no such adapter; tried: no file or folder of this name; adapters/nobody is not there, ",
        ),
        (
            "mini@nobody",
            r"mini@nobody: no such adapter; tried: lcm-lora-mini@nobody: no such alias; lcm-lora-mini has "
            r"champion; file:///.*/store/mini/channels/nobody\.json: no such pointer$",
        ),
        ("mini/7", r"tried: lcm-lora-mini/7: not registered at sqlite:///.*; a store has no numbered versions$"),
        ("other@champion", r"tried: lcm-lora-other@champion: not registered at sqlite.*; file.*json: no such pointer$"),
        (
            "models:/mini@champion",
            r"models:/mini@champion: no such adapter; tried: not registered at [^;]*$",
        ),
        ("models:/mini", r"models:/mini: expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        (
            "0123456789ab",
            r"tried: no adapter of this SHA-256 at sqlite.*; no release of an adapter with this SHA",
        ),
        ("mini/sha256-0123456789ab", r"mini/sha256-0123456789ab: no such release at file:///"),
        ("https://example.org/a.safetensors", r"expected a folder, .*download a file from such an address yourself"),
        (
            "release/mini",
            r"release/mini: no such file or folder; expected a folder, a \.safetensors file, MODEL, M",
        ),
        ("no/such/file.safetensors", r"no/such/file\.safetensors: no such file or folder; expected a folder"),
    ],
)
def test_what_is_not_found_is_told_in_one_line_with_everything_that_was_tried(
    places: Places, champion: str, form: str, message: str
):
    with pytest.raises(UserError, match=message) as raised:
        open_adapter(form, places)
    assert "\n" not in str(raised.value)


def test_an_alias_that_only_the_store_has_is_taken_from_there_and_said(
    places: Places, champion: str, capsys: pytest.CaptureFixture[str]
):
    assert places.publish
    publish.point_channel("mini", champion, places.publish, "staging")
    found = open_adapter("mini@staging", places)
    assert digest(found.weights.parent) == champion
    told = capsys.readouterr().err
    assert "note: mini@staging: is the release file:///" in told and "no such alias; lcm-lora-mini has champion" in told
    without = replace(places, registry=None)
    assert digest(open_adapter("mini@champion", without).weights.parent) == champion
    with pytest.raises(UserError, match=r"tried: lcm-lora-mini@champion: there is no registry: set MLFLOW_TRAC"):
        open_adapter("mini@champion", replace(without, publish=None))


def test_a_registry_that_does_not_answer_is_no_reason_to_look_elsewhere(places: Places, champion: str):
    closed = settings.Registry(tracking_uri="http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"MLflow at http://127\.0\.0\.1:9"):
        open_adapter("mini@champion", replace(places, registry=closed))


def test_a_pointer_that_is_wrong_is_no_reason_to_look_elsewhere(places: Places, champion: str, tmp_path: Path):
    _change(tmp_path / "store/mini/channels/champion.json", model="other")
    with pytest.raises(UserError, match=r"champion\.json: ") as raised:
        references.find_release("mini@champion", places)
    assert not isinstance(raised.value, NotFound)


def test_looking_makes_no_database_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    here = Places(tmp_path / "cache", settings.Registry(), settings.Publish())
    with pytest.raises(UserError, match=r"nothing is registered at sqlite:///mlflow\.db yet; .*/releases/mini/chan"):
        open_adapter("mini@champion", here)
    assert list(tmp_path.iterdir()) == []


def test_outside_a_project_the_environment_names_registry_store_and_cache(
    places: Places, champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert places.registry and places.publish
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("LCMLORA_CACHE", str(tmp_path / "mine"))
    with pytest.raises(UserError, match=r"mini/sha256-0123: there is no store: set LCMLORA_PUBLISH_TO"):
        open_adapter("mini/sha256-0123", Places.of_environment())
    with pytest.raises(UserError, match=r"mini: no such adapter; .*no project here .*; mini@champion names the regist"):
        open_adapter("mini", Places.of_environment())
    monkeypatch.setenv("LCMLORA_PUBLISH_TO", places.publish.to)
    assert digest(open_adapter(champion, Places.of_environment()).weights.parent) == champion
    monkeypatch.setenv("MLFLOW_TRACKING_URI", places.registry.tracking_uri)
    found = open_adapter("mini@champion", Places.of_environment())
    assert found.weights.parent == tmp_path / "mine/adapters" / f"sha256-{champion[:12]}"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_registered_release_that_was_changed_is_not_kept(config: Config, bundle: Path, tmp_path: Path):
    register_release("mini", config.registry, bundle)
    (stored,) = (path for path in tmp_path.rglob("artifacts/release/scheduler_config.json"))
    stored.write_bytes(b"[]")
    with pytest.raises(UserError, match=r"scheduler_config\.json: expected sha256"):
        open_adapter("models:/lcm-lora-mini/1", Places(tmp_path / "cache", config.registry))
    assert list((tmp_path / "cache").iterdir()) == []
    shutil.rmtree(stored.parent)
    with pytest.raises(UserError, match="lcm-lora-mini/1: has no release among the artifacts of its run"):
        open_adapter("models:/lcm-lora-mini/1", Places(tmp_path / "cache", config.registry))


def test_a_published_release_is_downloaded_file_by_file_as_its_manifest_lists_them(bundle: Path, tmp_path: Path):
    """In a directory; tests/integration has the same from S3."""
    store = settings.Publish(to=str(tmp_path / "store"))
    publish.publish_release(bundle, "mini", store)
    place = str(tmp_path / "store" / "mini" / f"sha256-{digest(bundle)[:12]}")
    assert catalog.find_release(place, store) == (Path(place).as_uri(), digest(bundle))
    (tmp_path / "out").mkdir()
    catalog.download_release(place, store, tmp_path / "out")
    verify(tmp_path / "out")
    Path(place, "grid.png").write_bytes(b"pnG")
    with pytest.raises(UserError, match=r"grid\.png: has 3 bytes, and 73 are listed"):
        catalog.download_release(place, store, tmp_path / "out")
    Path(place, "grid.png").unlink()
    with pytest.raises(UserError, match=r"grid\.png: is listed in manifest\.json and missing"):
        catalog.download_release(place, store, tmp_path / "out")
    _change(Path(place, "manifest.json"), files=[{"name": "../evil", "bytes": 1, "sha256": "0" * 64}])
    with pytest.raises(UserError, match=r"'\.\./evil' is not the name of a file"):
        catalog.download_release(place, store, tmp_path / "out")
    with pytest.raises(UserError, match=r"store: holds no manifest\.json, so no release"):
        catalog.find_release(str(tmp_path / "store"), store)
