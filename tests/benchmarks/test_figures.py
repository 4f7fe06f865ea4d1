from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import documents, figures, tables
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import Metrics
from tests.support.reports import searched

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("page", "block", "text"), figures.BLOCKS, ids=lambda it: getattr(it, "__name__", str(it)))
def test_the_figures_on_the_pages_are_those_of_the_metrics(page: Path, block: str, text) -> None:
    metrics = Metrics.read(ROOT / "metrics" / "emoji.json")
    assert tables.read(ROOT / page, block) == text(metrics), "run python -m benchmarks.figures"


def test_the_table_of_additions_is_that_of_the_committed_figures_and_says_if_they_are_of_an_earlier_adapter() -> None:
    found, now = (
        Compatibility.read(ROOT / "compatibility" / "emoji.json"),
        Metrics.read(ROOT / "metrics" / "emoji.json"),
    )
    written = tables.read(ROOT / "docs/compatibility.md", "figures")
    assert written == figures.compatibility(found, now.adapter), "run python -m benchmarks.figures"
    assert "earlier state" not in figures.compatibility(found, found.adapter)
    assert f"(now `{'e' * 12}`)" in figures.compatibility(found, "e" * 64)


@pytest.mark.parametrize("picture", [figures.GRID, documents.PICTURE], ids=str)
def test_the_pictures_on_the_pages_are_of_the_adapter_of_the_metrics(picture: Path) -> None:
    metrics = Metrics.read(ROOT / "metrics" / "emoji.json")
    assert figures.adapter_of(ROOT / picture) == metrics.adapter, "run python -m benchmarks.documents"


def test_a_picture_says_whose_results_it_shows(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "plain.png")
    assert figures.adapter_of(tmp_path / "plain.png") is None
    figures.save_picture(Image.new("RGB", (4, 4), "red"), tmp_path / "named.png", "a" * 64)
    assert figures.adapter_of(tmp_path / "named.png") == "a" * 64


def test_the_figures_name_the_solvers_settings_and_all_ways_to_compare() -> None:
    metrics = Metrics.parse(searched(), "metrics")
    headline = figures.readme(metrics).splitlines()
    assert headline[2].startswith("| 4 | DPM-Solver++, 4 steps, unguided | 290 | **81.0** |")
    assert "By more than chance, at 4 evaluations the student is nearer." in headline[-1]
    lines = figures.pairs(metrics).splitlines()
    assert lines[2] == (
        "| 4 | DPM-Solver++, 4 steps, unguided | 290 | **81.0** | \N{MINUS SIGN}209 (\N{MINUS SIGN}230 to "
        "\N{MINUS SIGN}190) | 2.1 (1.9 to 2.4) times as many | agree | 790 | 610 |"
    )
    assert "In 4 steps the student's caption retrieval is 0.400, the teacher's in 50 0.400." in lines[-1]
    assert "second features scattering/192@full-size" in lines[-1]
    rows = figures.page(metrics).splitlines()
    assert "| DDIM | 2 steps, guidance 3, leading | 4 | 330 | 820 | 0.400 | 0.440 | 3.00 |" in rows
    assert "| student | 4 steps | 4 | 81.0 (70.0 to 92.0) | 610 | 0.400 | 0.440 | 0.75 |" in rows
    assert len({row.count("|") for row in rows}) == 1


def test_a_block_is_written_between_its_comments_and_read_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n<!-- table -->\n<!-- end of table -->\n"
    )
    tables.write(page, "new\n", "figures")
    tables.write(page, "| a |\n")
    assert (tables.read(page, "figures"), tables.read(page)) == ("new\n", "| a |\n")
    assert (
        page.read_text().startswith("before\n<!-- figures -->\nnew\n") and "after\n<!-- table -->" in page.read_text()
    )
