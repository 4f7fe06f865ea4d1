import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcmlora import config as settings
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import folders
from lcmlora.cli.adapters import references
from lcmlora.cli.adapters.references import AdapterReference
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.project import Project
from lcmlora.registry.promotion import promote_passed
from lcmlora.registry.registration import register_release
from lcmlora.releases import catalog, publish
from lcmlora.releases.bundle import ADAPTER_FILES, SCHEDULER, WEIGHTS, digest, verify
from tests.support import releases
from tests.support.miniature import RESOLUTION, save_base
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


# --- adapters -----------------------------------------------------------------------------------------------------


def test_a_release_says_how_it_is_drawn_with_and_what_base_it_was_made_for(bundle: Path, tmp_path: Path):
    found = references.open_adapter(str(bundle), None, tmp_path / "cache")
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
    assert references.open_adapter(str(tmp_path), None, tmp_path).sampler == Sampler(scheduler, gamma, 20)
    _change(tmp_path / "config.json", sampler={"scheduler": scheduler, "gamma": 0.1, "grid": 50})
    assert references.open_adapter(str(tmp_path), None, tmp_path).sampler == Sampler(scheduler, 0.1, 50)


def test_a_file_is_described_by_what_lies_beside_it_only_where_that_is_about_it(bundle: Path, tmp_path: Path):
    (bundle / "SHA256SUMS").unlink()
    _change(bundle / "provenance.json", kohya={"file": "lcm-lora-mini.safetensors"})
    for name in ("lcm-lora-mini.safetensors", "stranger.safetensors"):
        shutil.copy(bundle / WEIGHTS, bundle / name)
    ours, kohya, other = (
        references.open_adapter(str(bundle / name), None, tmp_path)
        for name in (WEIGHTS, "lcm-lora-mini.safetensors", "stranger.safetensors")
    )
    assert ours.model == kohya.model == "mini"
    assert (kohya.weights.name, other.weights.name) == ("lcm-lora-mini.safetensors", "stranger.safetensors")
    assert (other.model, other.base, other.sampler) == (None, None, None)


def test_a_damaged_release_and_a_name_of_nothing_are_refused(bundle: Path, tmp_path: Path):
    (bundle / WEIGHTS).write_bytes(b"weightS")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: expected sha256"):
        references.open_adapter(str(bundle), None, tmp_path)
    with pytest.raises(UserError, match=r"nothing: no such adapter; expected a folder, a \.safetensors file, models:/"):
        references.open_adapter("nothing", None, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: no such file; .*empty is not the folder"):
        references.open_adapter(str(tmp_path / "empty"), None, tmp_path)


def test_a_registered_version_is_downloaded_once_by_its_alias(config: Config, bundle: Path, tmp_path: Path):
    promote_passed(register_release("mini", config.registry, bundle), config.registry, reason="first")
    for name in ("models:/lcm-lora-mini@champion", "models:/lcm-lora-mini/1"):
        found = references.open_adapter(name, config, tmp_path / "cache")
        assert found.shown == name and found.model == "mini"
        verify(found.weights.parent, ADAPTER_FILES)
        assert digest(found.weights.parent) == digest(bundle)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"sha256-{digest(bundle)[:12]}"]
    with pytest.raises(UserError, match="lcm-lora-mini@nobody: no such alias; lcm-lora-mini has champion"):
        references.open_adapter("models:/lcm-lora-mini@nobody", config, tmp_path / "cache")
    with pytest.raises(UserError, match=r"needs registry in params\.yaml, and there is none here"):
        references.open_adapter("models:/lcm-lora-mini@champion", None, tmp_path / "cache")


def test_a_registered_release_that_was_changed_is_not_kept(config: Config, bundle: Path, tmp_path: Path):
    register_release("mini", config.registry, bundle)
    (stored,) = (path for path in tmp_path.rglob("artifacts/release/scheduler_config.json"))
    stored.write_bytes(b"[]")
    with pytest.raises(UserError, match=r"scheduler_config\.json: expected sha256"):
        references.open_adapter("models:/lcm-lora-mini/1", config, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    shutil.rmtree(stored.parent)
    with pytest.raises(UserError, match="lcm-lora-mini/1: has no release among the artifacts of its run"):
        references.open_adapter("models:/lcm-lora-mini/1", config, tmp_path / "cache")


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


# --- bases --------------------------------------------------------------------------------------------------------


def _made_for(source: str, model: str | None = None, **facts: Any) -> AdapterReference:
    return AdapterReference("it", Path("it"), model=model, base={"source": source}, **facts)


def test_a_base_is_found_by_name_by_folder_and_by_what_the_adapter_says(
    config: Config, miniatures: Callable[[str], Path]
):
    folder = miniatures("sd2")
    named = references.find_base("mini", _made_for("elsewhere"), config, Project())
    assert named and (named.name, named.folder, named.settings.resolution) == ("mini", Path("bases/mini"), RESOLUTION)
    asked = references.find_base(str(folder), _made_for("elsewhere"), None, Project())
    assert asked and (asked.folder, asked.settings.resolution, asked.settings.variant) == (folder, RESOLUTION, None)
    own = references.find_base(None, _made_for(config.bases["mini"].source, "mini"), config, Project())
    assert own and own.folder == Path("bases/mini")
    local = references.find_base(None, _made_for(str(folder), resolution=32), config, Project())
    assert local and (local.folder, local.settings.resolution) == (folder, 32)
    assert references.find_base(None, _made_for("hub/id", "mini"), config, Project()) is None
    with pytest.raises(UserError, match=r"--base: sd99: no such folder and no such base; params\.yaml has mini"):
        references.find_base("sd99", _made_for("x"), config, Project())
    with pytest.raises(UserError, match=r"--base: sd99: .*there is no params\.yaml here"):
        references.find_base("sd99", _made_for("x"), None, Project())


def test_a_half_precision_folder_is_loaded_by_its_variant(tmp_path: Path):
    folder = save_base(tmp_path / "half", variant="fp16")
    found = references.find_base(str(folder), _made_for("x"), None, Project())
    assert found and found.settings.variant == "fp16"


def test_the_layers_of_a_base_that_was_not_fetched_are_known_where_it_is_published(config: Config):
    published = config.bases["mini"].model_copy(update={"source": "segmind/SSD-1B", "resolution": 1024})
    base = references.BaseReference("ssd1b", published, Path("bases/ssd1b"))
    assert (base.architecture().naming.name, base.architecture().resolution) == ("ssd1b", 1024)


def test_another_base_is_told_by_its_digest_and_an_unknown_one_passes():
    adapter = AdapterReference("it", Path("it"), base={"source": "bases/mine", "digest": "a" * 64})
    folders.check_same_base("it", adapter.base, {"source": "bases/mine", "digest": "a" * 64}, "this base is")
    folders.check_same_base("it", adapter.base, {"source": "bases/mine", "digest": None}, "this base is")
    folders.check_same_base("it", None, {"digest": "b" * 64}, "this base is")
    expected = (
        r"it: was made for bases/mine \(digest a{12}\.\.\.\), and this base is bases/x \(digest b{12}\.\.\.\); .*"
    )
    with pytest.raises(UserError, match=expected + "--other-base"):
        folders.check_same_base("it", adapter.base, {"source": "bases/x", "digest": "b" * 64}, "this base is")
