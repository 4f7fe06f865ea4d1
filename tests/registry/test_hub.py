"""Adapters from repositories of the hub, by its own client and a server that answers as the hub does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lcmlora.adapters.metadata import WEIGHTS
from lcmlora.errors import Unavailable, UserError
from lcmlora.registry.references import Places, open_adapter
from lcmlora.releases import bundle
from tests.support import hub as hubs
from tests.support import releases
from tests.support.hub import Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with hubs.serving(tmp_path / "hub-cache") as served:
        yield served


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "cache")


def test_the_weights_of_a_repository_are_downloaded_once_for_each_commit(
    hub: Hub, places: Places, capsys: pytest.CaptureFixture[str]
):
    commit = hub.add("owls/lcm", {WEIGHTS: b"weights", "README.md": b"x", "samples/a.png": b"y", "model.bin": b"z"})
    found = open_adapter("owls/lcm", places)
    assert found.weights == places.cache / f"hub-owls--lcm@{commit[:12]}" / WEIGHTS
    assert [path.name for path in found.weights.parent.iterdir()] == [WEIGHTS]
    assert found.weights.read_bytes() == b"weights"
    assert f"note: owls/lcm is at commit {commit}; owls/lcm@{commit} names this state of it" in capsys.readouterr().err
    hub.requests.clear()
    assert open_adapter(f"owls/lcm@{commit}", places).weights == found.weights
    assert hub.requests == []  # a commit that is here needs no hub
    assert open_adapter("owls/lcm@main", places).weights == found.weights
    assert not any("resolve" in path for path in hub.requests)
    later = hub.add("owls/lcm", {WEIGHTS: b"better weights"})
    assert open_adapter("owls/lcm", places).weights.parent.name == f"hub-owls--lcm@{later[:12]}"


def test_a_release_on_the_hub_brings_its_facts_and_is_checked(hub: Hub, places: Places, tmp_path: Path):
    folder = releases.write_sealed(tmp_path / "bundle")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add("owls/release", files)
    found = open_adapter("owls/release", places)
    assert found.model == "mini" and found.base and found.base["digest"] == "b" * 64
    assert bundle.digest(found.weights.parent) == bundle.digest(folder)
    hub.add("owls/changed", files | {WEIGHTS: b"others"})
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: expected sha256"):
        open_adapter("owls/changed", places)


def test_what_the_hub_does_not_have_is_told_and_what_it_does_not_answer_may_be_asked_again(hub: Hub, places: Places):
    hub.add("owls/base", {"model_index.json": b"{}", "unet.safetensors": b""})
    hub.add("owls/two", {"a.safetensors": b"", "b.safetensors": b""})
    hub.add("owls/peft", {"adapter_model.safetensors": b"", "adapter_config.json": b"{}"})
    for reference, message in (
        ("owls/nothing", r"owls/nothing: cannot be downloaded from the hub: .*"),
        ("owls/two@v9", r"owls/two@v9: cannot be downloaded from the hub: .*"),
        ("owls/base", r"owls/base: is a base \(it has model_index\.json\), not an adapter"),
        ("owls/two", r"or one other \.safetensors file in its top folder, got a\.safetensors, b\.safetensors$"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            open_adapter(reference, places)
        assert "\n" not in str(raised.value) and not isinstance(raised.value, Unavailable), reference
    assert not places.cache.exists() or list(places.cache.iterdir()) == []
    found = open_adapter("owls/peft", places)
    assert {path.name for path in found.weights.parent.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    hub.busy = True
    with pytest.raises(Unavailable, match=r"owls/two: cannot be downloaded from the hub: "):
        open_adapter("owls/two", places)
