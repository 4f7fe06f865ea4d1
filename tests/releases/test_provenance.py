"""provenance.json as earlier versions of lcmlora wrote it. The files' names have the days of these versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcmlora.adapters.metadata import Sampler
from lcmlora.releases.bundle import PROVENANCE, Provenance, read_facts

FILES = Path(__file__).parent / "files"
FIRST, WITH_SAMPLER, WITH_TIME = (FILES / f"provenance-2026-11-{day}.json" for day in (23, 25, 28))


@pytest.mark.parametrize("file", [FIRST, WITH_SAMPLER, WITH_TIME], ids=lambda file: file.stem)
def test_it_is_written_again_to_the_byte(file: Path, tmp_path: Path):
    Provenance.read(file).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_the_first_version_has_neither_sampler_nor_resolution_nor_time():
    provenance = Provenance.read(FIRST)
    assert (provenance.sampler, provenance.resolution, provenance.packaged, provenance.kohya) == (None,) * 4
    assert (provenance.params.distill.objective, provenance.params.distill.gamma) == ("lcm", None)
    assert (provenance.params.gate.steps, provenance.params.gate.min_retrieval) == (4, 0.8)


def test_later_versions_have_them():
    provenance = Provenance.read(WITH_TIME)
    assert provenance.sampler and provenance.sampler.plain() == {
        "scheduler": "TCDScheduler",
        "gamma": 0.3,
        "grid": 20,
    }
    assert (provenance.resolution, provenance.packaged) == (64, "2026-11-28T22:03:17Z")
    assert provenance.kohya and provenance.kohya.file == "lcm-lora-emoji.safetensors"


@pytest.mark.parametrize(
    ("file", "sampler"),
    [
        (FIRST, Sampler("LCMScheduler", None, 40)),  # from scheduler_config.json and the objective
        (WITH_SAMPLER, Sampler("TCDScheduler", 0.3, 20)),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_an_adapter_in_its_folder_is_known_by_it(file: Path, sampler: Sampler, tmp_path: Path):
    (tmp_path / PROVENANCE).write_bytes(file.read_bytes())
    scheduler = '{"_class_name": "LCMScheduler", "original_inference_steps": 40}'
    (tmp_path / "scheduler_config.json").write_text(scheduler)
    facts = read_facts(tmp_path)
    assert facts.model == "emoji" and facts.base and facts.base["source"] == "bases/emoji"
    assert facts.sampler == sampler
