"""docs/large-registry.md has the tables of docs/large-registry.json."""

import json
from pathlib import Path

from benchmarks import registries, tables

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_tables_of_the_measurement():
    found = json.loads((ROOT / registries.JSON).read_text())
    assert tables.read(ROOT / registries.PAGE) == registries.show(found), "run python -m benchmarks.registries --tables"
