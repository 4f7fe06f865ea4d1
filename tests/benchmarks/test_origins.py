from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import documents, origins, tables, universal
from benchmarks.origins import Origin
from lcmlora.errors import UserError
from lcmlora.project import Project

ROOT = Path(__file__).parents[2]
NOW = Origin(adapter="a" * 64, recipe={"lr": 0.1, "rank": 64}, captions=32, reference_digest="e" * 64)


@pytest.fixture(scope="module")
def now() -> Origin:
    return origins.present(Project(ROOT))


def test_today_is_the_adapter_of_the_metrics_and_the_recipe_of_the_settings(now: Origin) -> None:
    metrics = json.loads((ROOT / "metrics/emoji.json").read_text())
    assert (now.adapter, now.captions) == (metrics["adapter"], metrics["prompts"])
    assert now.recipe is not None and (now.recipe["objective"], now.recipe["steps"]) == ("tcd", 700)


@pytest.mark.parametrize("name", origins.PAGES)
def test_a_page_says_of_which_adapter_and_captions_its_figures_are(name: str, now: Origin) -> None:
    found = origins.read(name, ROOT / "docs")
    said = tables.read(ROOT / "docs" / f"{name}.md", "origin")
    assert said == origins.sentence(name, found, now), "run python -m benchmarks.figures"
    earlier = found.captions != now.captions or (found.adapter or now.adapter) != now.adapter
    assert ("of an earlier state" in said) >= earlier


def test_the_tables_of_the_study_are_those_of_its_file() -> None:
    found = json.loads((ROOT / "docs/universal.json").read_text())
    assert tables.read(ROOT / "docs/universal.md") == universal.text(found)
    assert found["origin"]["adapter"] == found["adapter"]


def test_another_adapter_other_captions_and_another_recipe_are_told_with_those_of_today() -> None:
    found = NOW.model_copy(update={"adapter": "b" * 64, "captions": 45, "recipe": {"lr": 0.2, "gone": 1}})
    assert origins.sentence("sources", found, NOW) == (
        "**These figures are of an earlier state:** adapter `bbbbbbbbbbbb` (now `aaaaaaaaaaaa`), `lr` `0.2` (now "
        "`0.1`), captions 45 (now 32). `python -m benchmarks.documents sources` measures again.\n"
    )


def test_figures_of_today_are_told_as_such() -> None:
    told = "These figures are of the present adapter, `aaaaaaaaaaaa`, on the present 32 captions.\n"
    assert origins.sentence("universal", NOW, NOW) == told
    runs = NOW.model_copy(update={"adapter": None, "recipe": {"rank": 64}})
    told = "These figures are of adapters of the present recipe on the present 32 captions.\n"
    assert origins.sentence("objectives", runs, NOW) == told


def test_runs_share_the_recipe_but_for_what_they_compare(now: Origin) -> None:
    recipe = now.recipe or {}
    runs = [{"settings": recipe | {"seed": seed, "device": "cpu"}} for seed in (0, 1)]
    found = origins.of_runs(runs, Project(ROOT))
    assert found.adapter is None and found.reference_digest == now.reference_digest
    assert found.recipe == {key: value for key, value in recipe.items() if key != "seed"}
    assert origins.differences(found, now) == []


def test_only_documents_of_an_earlier_adapter_are_made_again_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    earlier = [name for name, part in documents.PARTS.items() if part.state(Project())]
    assert documents.chosen([], Project()) == earlier
    assert documents.chosen(["report", "figures"], Project()) == ["figures", "report"]


def test_a_picture_of_a_page_needs_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match="chromium, chromium-browser, google-chrome: none is installed"):
        documents.screenshot(tmp_path / "page.html", tmp_path / "out.png")
