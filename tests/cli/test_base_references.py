"""Bases, as people name them on the command line and as adapters name theirs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcmlora import config as settings
from lcmlora.bases import folders
from lcmlora.cli.adapters import base_references
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.io.private import downloads
from lcmlora.project import Project
from lcmlora.registry.references import AdapterReference
from tests.support import releases
from tests.support.miniature import RESOLUTION, save_base


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The shipped params.yaml in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(releases.settings(tmp_path / "base")))
    return settings.load(tmp_path / "params.yaml")


def _made_for(source: str, model: str | None = None, **facts: Any) -> AdapterReference:
    return AdapterReference("it", Path("it"), model=model, base={"source": source}, **facts)


def test_a_base_is_found_by_name_by_folder_and_by_what_the_adapter_says(
    config: Config, miniatures: Callable[[str], Path]
):
    folder = miniatures("sd2")
    named = base_references.find_base("mini", _made_for("elsewhere"), config, Project())
    assert named and (named.name, named.folder, named.settings.resolution) == ("mini", Path("bases/mini"), RESOLUTION)
    asked = base_references.find_base(str(folder), _made_for("elsewhere"), None, Project())
    assert asked and (asked.folder, asked.settings.resolution, asked.settings.variant) == (folder, RESOLUTION, None)
    own = base_references.find_base(None, _made_for(config.bases["mini"].source, "mini"), config, Project())
    assert own and own.folder == Path("bases/mini")
    local = base_references.find_base(None, _made_for(str(folder), resolution=32), config, Project())
    assert local and (local.folder, local.settings.resolution) == (folder, 32)
    assert base_references.find_base(None, _made_for("hub/id", "mini"), config, Project()) is None
    with pytest.raises(UserError, match=r"--base: sd99: no such folder and no such base; params\.yaml has mini"):
        base_references.find_base("sd99", _made_for("x"), config, Project())
    with pytest.raises(UserError, match=r"--base: sd99: .*there is no params\.yaml here"):
        base_references.find_base("sd99", _made_for("x"), None, Project())


def test_a_base_of_the_hub_that_was_downloaded_once_is_found_in_the_users_cache(
    miniatures: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commit = "0123456789" * 4
    kept = shutil.copytree(miniatures("sd2"), downloads("bases") / f"owner--mini@{commit}")
    (kept / ".revision").write_text(f"owner/mini@{commit} \n")
    adapter = AdapterReference("it", Path("it"), base={"source": "owner/mini", "revision": commit, "variant": None})
    found = base_references.find_base(None, adapter, None, Project(tmp_path), fetch=True)
    assert found and (found.folder, found.settings.resolution) == (kept, RESOLUTION)
    assert base_references.find_base(None, adapter, None, Project(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_half_precision_folder_is_loaded_by_its_variant(tmp_path: Path):
    folder = save_base(tmp_path / "half", variant="fp16")
    found = base_references.find_base(str(folder), _made_for("x"), None, Project())
    assert found and found.settings.variant == "fp16"


def test_the_layers_of_a_base_that_was_not_fetched_are_known_where_it_is_published(config: Config):
    published = config.bases["mini"].model_copy(update={"source": "segmind/SSD-1B", "resolution": 1024})
    base = base_references.BaseReference("ssd1b", published, Path("bases/ssd1b"))
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
