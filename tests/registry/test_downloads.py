"""Versions in the user's cache: downloaded once, mended, verified, and found without the registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcmlora import registry
from lcmlora.config import Registry
from lcmlora.errors import NotFound, UserError
from lcmlora.io.private import downloads
from lcmlora.registry.downloads import offline
from lcmlora.registry.promotion import promote_passed
from lcmlora.registry.registration import register_release
from lcmlora.releases.bundle import WEIGHTS, digest
from tests.support.registries import fresh
from tests.support.releases import write_sealed


@pytest.fixture
def settings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry whose champion is model `mini`, in version 1."""
    monkeypatch.chdir(tmp_path)
    settings = fresh(tmp_path, tmp_path_factory)
    version = register_release("mini", settings, write_sealed(tmp_path / "bundle"))
    promote_passed(version, settings, reason="first")
    return settings


def test_without_settings_the_environment_names_the_registry(settings: Registry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for ask in (registry.versions, lambda: registry.resolve("mini@champion"), lambda: registry.champion("mini")):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI: is not set; set it to the address of MLflow"):
            ask()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri)
    assert [version.reference for version in registry.versions()] == ["lcm-lora-mini/1"]
    found = registry.champion("mini")
    assert found and found == registry.resolve("mini@champion")
    assert registry.pull("mini@champion").parent == downloads("adapters")


def test_a_damaged_download_in_the_cache_is_made_anew_and_one_elsewhere_is_refused(
    settings: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kept, chosen = registry.pull("mini/1", settings), registry.pull("mini/1", settings, tmp_path / "chosen")
    assert registry.verify(kept, settings).reference == "lcm-lora-mini/1"
    for folder in (kept, chosen):
        (folder / WEIGHTS).write_bytes(b"weightS")
        with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: expected sha256"):
            registry.verify(folder, settings)
    assert registry.pull("mini/1", settings) == kept and (kept / WEIGHTS).read_bytes() == b"weights"
    assert "it is downloaded again" in capsys.readouterr().err
    with pytest.raises(UserError, match="chosen: exists"):
        registry.pull("mini/1", settings, tmp_path / "chosen")


def test_a_release_that_the_registry_does_not_know_is_told(settings: Registry, tmp_path: Path):
    strange = write_sealed(tmp_path / "strange", weights=b"strange")
    with pytest.raises(UserError, match=r"strange: [0-9a-f]{64}: no adapter of this SHA-256 at sqlite"):
        registry.verify(strange, settings)
    (strange / "grid.png").write_bytes(b"another")
    with pytest.raises(UserError, match=r"grid\.png: expected sha256"):
        registry.verify(strange, settings)


def test_offline_a_version_has_the_names_that_it_had_when_it_was_downloaded(
    settings: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    online = registry.resolve("mini@champion", settings)
    folder = registry.pull("mini@champion", settings)
    (tmp_path / "mlflow.db").unlink()
    monkeypatch.setenv("LCMLORA_OFFLINE", "1")
    for name in ("mini@champion", "lcm-lora-mini@champion", "models:/lcm-lora-mini/1", "mini/1", digest(folder)[:12]):
        assert registry.resolve(name, settings) == online, name
        assert registry.pull(name, settings) == folder
    assert registry.verify(folder, settings) == online
    with pytest.raises(
        NotFound, match=r"lcm-lora-mini@staging: was never downloaded from sqlite.*LCMLORA_OFFLINE keeps"
    ):
        registry.resolve("mini@staging", settings)
    with pytest.raises(NotFound, match=r"was never downloaded from http://elsewhere"):
        registry.resolve("mini@champion", Registry(tracking_uri="http://elsewhere"))
    with pytest.raises(UserError, match=r"lcm-lora-mini/1: is not in .*adapters, and LCMLORA_OFFLINE is set"):
        registry.pull("mini/1", settings, everything=True)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_cache_that_has_everything_need_not_be_written_to(settings: Registry, monkeypatch: pytest.MonkeyPatch):
    folder = registry.pull("mini@champion", settings)
    written = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*.json")}
    assert registry.pull("mini@champion", settings) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*.json")} == written
    monkeypatch.setenv("LCMLORA_OFFLINE", "0")
    assert not offline.is_asked_for()
