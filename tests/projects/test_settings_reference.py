"""The reference of all settings: complete, and what is committed is up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from lcmlora.config import SECTIONS, Config
from lcmlora.projects import settings_reference
from lcmlora.settings import bases, data, evaluation, services, training

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("option", "file"), [("--docs", "docs/configuration.md"), ("--schema", ".lcmlora/params.schema.json")]
)
def test_what_is_committed_is_up_to_date(option: str, file: str):
    """Else `lcmlora config OPTION > FILE` writes it. In a process of its own: other tests add names to the tables."""
    command = [sys.executable, "-m", "lcmlora", "config", option]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / file).read_text()


def test_every_setting_has_a_description():
    models = [Config]
    for module in (bases, data, evaluation, services, training):
        found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, BaseModel)]
        models += [model for model in found if model.__module__ == module.__name__]
    missing = [f"{m.__name__}.{name}" for m in models for name, f in m.model_fields.items() if not f.description]
    assert missing == [] and len(models) > 15


def unknown(values: Any, entry: dict[str, Any], told: dict[str, Any]) -> list[str]:
    """Returns the keys that the schema does not have."""
    if "$ref" in entry:
        entry = told["$defs"][entry["$ref"].rsplit("/", 1)[1]]
    found = []
    for option in (entry, *entry.get("anyOf", ())):
        option = told["$defs"][option["$ref"].rsplit("/", 1)[1]] if "$ref" in option else option
        if isinstance(values, dict) and ("properties" in option or "additionalProperties" in option):
            for key, value in values.items():
                inner = option.get("properties", {}).get(key, option.get("additionalProperties"))
                found += unknown(value, inner, told) if isinstance(inner, dict) else [] if inner else [key]
            return found
    return found


def test_the_schema_knows_the_keys_of_params_yaml_and_no_others():
    told = settings_reference.json_schema(Config)
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert unknown(raw, told, told) == []
    raw["bases"]["emoji"]["distill"]["stepz"] = 1
    raw["evaluation"] = {"picturez": 1}
    assert unknown(raw, told, told) == ["stepz", "picturez"]
    assert told["properties"]["distill"]["properties"]["rank"]["exclusiveMinimum"] == 0


def test_params_yaml_names_the_schema_for_editors():
    first = (ROOT / "params.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=.lcmlora/params.schema.json"


def test_the_page_has_a_table_for_each_section_and_the_families_numbers():
    page = settings_reference.configuration_page(Config)
    for section in (*SECTIONS, "data", "gate", "registry", "publish", "flow", "bases", "styles", "study"):
        assert f"\n## `{section}`\n" in page
    assert "| `distill.batch` | 16 | 16 | 8 |" in page
    assert "| `rollouts.w` | number, at least 0 | 7.5 |" in page
