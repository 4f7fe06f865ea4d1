"""`lcmlora.load_pipeline` outside a project, and with adapters that are no releases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lcmlora
from lcmlora.adapters import formats
from lcmlora.bases import architecture
from lcmlora.errors import UserError
from lcmlora.inference import pipelines
from lcmlora.releases.bundle import PROVENANCE, SCHEDULER, WEIGHTS
from tests.support import served


@pytest.fixture(scope="module")
def released(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(miniatures("sd15"), tmp_path_factory.mktemp("released") / "mini", gamma=0.3)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _drawn(pipeline: pipelines.Drawer) -> np.ndarray:
    (picture,) = pipeline("tree", steps=2, seed=5)
    return np.asarray(picture).astype(int)


def test_a_folder_is_loaded_without_a_project_and_draws_as_the_release_does(released: Path):
    expected = pipelines.load(released, device="cpu", warm=False)
    found = lcmlora.load_pipeline(released, "cpu")
    assert isinstance(found, pipelines.Pipeline) and found.provenance == expected.provenance
    assert (_drawn(found) == _drawn(expected)).all()


def test_another_programs_file_draws_on_the_base_that_is_named(
    released: Path, miniatures: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = miniatures("sd15")
    formats.convert(released / WEIGHTS, tmp_path / "foreign.safetensors", formats.KOHYA, architecture.of_folder(base))
    with pytest.raises(UserError, match=r"foreign\.safetensors: does not say which base it was made for; name"):
        lcmlora.load_pipeline("foreign.safetensors", "cpu")
    found = lcmlora.load_pipeline("foreign.safetensors", "cpu", base=str(base))
    assert "foreign.safetensors has no sampler settings; it is drawn with as an LCM-LoRA" in capsys.readouterr().err
    assert (found.sampler.scheduler, found.name) == ("LCMScheduler", "foreign.safetensors")
    assert type(found.pipeline.scheduler).__name__ == "LCMScheduler" and _drawn(found).any()


def test_what_distil_wrote_draws_with_its_own_sampler_on_its_own_base_alone(
    released: Path, miniatures: Callable[[str], Path], tmp_path: Path
):
    """The release without its provenance is what `distill` writes: weights, scheduler, and config.json."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (WEIGHTS, SCHEDULER):
        shutil.copyfile(released / name, folder / name)
    shutil.copyfile(released / PROVENANCE, folder / "config.json")
    found, expected = lcmlora.load_pipeline("adapter", "cpu"), pipelines.load(released, device="cpu")
    assert not isinstance(found, pipelines.Pipeline)
    assert (found.sampler, found.resolution) == (expected.sampler, expected.resolution)
    assert np.abs(_drawn(found) - _drawn(expected)).max() <= 1
    with pytest.raises(UserError, match=r"was made for .* and the base in .* has digest"):
        lcmlora.load_pipeline("adapter", "cpu", base=miniatures("sd2"))
    with pytest.raises(UserError, match="control: expected a pipeline that was loaded with a ControlNet"):
        found("tree", control=Image.new("RGB", (16, 16)))


def test_without_a_project_and_an_address_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"mini@champion: no such adapter; tried: .*MLFLOW_TRACKING_URI"):
        lcmlora.load_pipeline("mini@champion", "cpu")
