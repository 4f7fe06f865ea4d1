"""config.json and scheduler_config.json beside an adapter, as earlier versions wrote them: they are still read."""

import json
from pathlib import Path

import pytest

from lcmlora.adapters.metadata import FACTS, AdapterFacts, Combined, Distilled, Sampler, read_sampler
from lcmlora.errors import UserError
from lcmlora.io.documents import Document
from lcmlora.releases.bundle import read_facts

FILES = Path(__file__).parent / "files"
BASE = {"digest": "0", "revision": None, "source": "mini"}


def test_an_adapter_from_before_samplers_were_written_has_that_of_its_scheduler():
    folder = FILES / "distilled-2026-11-23"
    assert "sampler" not in json.loads((folder / FACTS).read_text())
    assert read_facts(folder) == AdapterFacts(model="mini", base=BASE, sampler=Sampler("LCMScheduler", None, 50))
    with pytest.raises(UserError, match=r"distilled-2026-11-23/config.json: sampler: is missing"):
        Distilled.read(folder / FACTS)  # for `package`, which needs a validation, too


def test_an_adapter_with_its_sampler_has_the_same_facts():
    folder = FILES / "distilled-2026-11-28"
    assert read_facts(folder) == AdapterFacts(model="mini", base=BASE, sampler=Sampler("LCMScheduler", None, 50))
    distilled = Distilled.read(folder / FACTS)
    assert (distilled.distill.objective, distilled.distill.alpha, distilled.distill.gamma) == ("lcm", 8.0, 0.3)
    assert (distilled.validation.best_step, distilled.validation.loss["3"]) == (3, 0.6241859197616577)


def test_a_combination_has_the_base_resolution_and_sampler_of_its_adapter():
    facts = read_facts(FILES / "combined-2026-11-28")
    assert (facts.model, facts.resolution, facts.sampler) == ("mini", 16, Sampler("TCDScheduler", 0.3, 50))
    assert facts.base is not None and facts.base["digest"] == "a" * 64
    combined = Combined.read(FILES / "combined-2026-11-28" / FACTS)
    assert [part.weight for part in combined.combined] == [0.8, 1.0]
    assert combined.truncation is not None and combined.truncation.overall == 0.35704569922154145


@pytest.mark.parametrize(
    ("folder", "document"), [("distilled-2026-11-28", Distilled), ("combined-2026-11-28", Combined)]
)
def test_a_file_that_is_read_and_written_again_has_the_same_bytes(
    tmp_path: Path, folder: str, document: type[Document]
):
    document.read(FILES / folder / FACTS).write(tmp_path / FACTS)
    assert (tmp_path / FACTS).read_bytes() == (FILES / folder / FACTS).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": 7}, "scheduler: expected a name, got 7"),
        ({"gamma": 1.5}, "gamma: expected 0 to 1, got 1.5"),
        ({"gamma": True}, "gamma: expected 0 to 1, got True"),
        ({"grid": 0}, "expected 1 to 1000 timesteps, got 0"),
        ({"grid": 50, "order": 2}, "does not know 'order', which a newer lcmlora may have written"),
    ],
)
def test_sampler_settings_of_no_sampler_are_refused_with_their_key(settings: dict[str, object], message: str):
    with pytest.raises(UserError, match=rf"^a\.json: sampler: {message}$"):
        read_sampler(settings, "a.json: sampler")


def test_sampler_settings_that_a_file_lacks_have_defaults():
    assert read_sampler({"grid": 20}, "a.json") == Sampler("LCMScheduler", None, 20)
