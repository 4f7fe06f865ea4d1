from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import hardware, tables
from lcmlora.io.parsing import read_json

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_figures_and_every_cell_says_whether_it_was_counted_or_measured():
    found = read_json(ROOT / hardware.FIGURES)
    assert tables.read(ROOT / hardware.PAGE) == hardware.show(found), "run python -m benchmarks.hardware"
    rows = [
        line.strip("| ").split(" | ") for line in hardware.show(found).splitlines() if line.startswith(("| sd", "| ss"))
    ]
    assert [(row[0], row[1]) for row in rows] == [
        (base, str(memory)) for base in hardware.PUBLISHED for memory in hardware.SIZES
    ]
    cells = [cell for row in rows for number, cell in enumerate(row) if number not in (0, 1, 5) and cell]
    assert all(cell.endswith(f" {hardware.COUNTED}") for cell in cells)


def test_what_was_counted_for_the_emoji_base_is_what_was_measured():
    own = read_json(ROOT / hardware.FIGURES)["measured"]
    assert own["counted_bytes"] == pytest.approx(own["measured_bytes"], rel=0.1)
