"""What lcmlora 0.1.0 left in dvc.lock: settings by the keys of params.yaml, and digests of source files.

It knew neither resolved.yaml nor versions of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lcmlora.io.parsing import JsonObject
from lcmlora.projects.upgrade.conversions import convert
from lcmlora.projects.upgrade.yaml_text import YamlText
from lcmlora.stages import Run

RELEASE = (0, 1, 0)
PARAMS = "params.yaml"

# The generated files of 0.1.0, by the SHA-256 of their text: what a person has not edited may be written anew.
FILES = {
    "dvc.yaml": "4c74eceb8768ed3728da6fabb3819413ae4e149189559e625bc91b023ff4d1b7",
    "prefect.yaml": "7faa85a683c76ddbd73e97ef5fd1a25728f5daf97198dcf1fc8b766524c1af47",
    ".gitignore": "b873a6bcecc56a703da38fb7061ceda569370c847c45bb4d5634dfa5761e38dc",
    ".dvcignore": "05cc6ae53cfd6129f1d7010aa874c6cf0a6019b1adfeff3f4fab27f2d04f43ca",
}

# Folders of a project of 0.1.0, a clone of lcmlora's repository, that the installed package replaces.
CODE = ("lcmlora", "flows", "tasks", "tests", "benchmarks")

_SECTIONS = ("data", "encode", "distill", "evaluation", "gate", "study")
_OF_BASE = ("encode", "distill", "evaluation")  # whose settings a base could change


def is_source_file(path: str) -> bool:
    """Returns whether an input of a stage was one of the package's own files, which are inputs no longer."""
    return path.startswith("lcmlora/")


def entry(recorded: Mapping[str, Any], run: Run) -> JsonObject:
    """Returns the settings of a stage's last run as resolved.yaml would have them, by section.

    Args:
        recorded: what dvc.lock has of params.yaml, by key: data, evaluation.seed, bases.emoji.
    """
    values = _converted(recorded)
    base = values.get(f"bases.{run.model}", {})
    found = {name: values[name] for name in _SECTIONS if isinstance(values.get(name), dict)}
    for name in _OF_BASE:
        if name in found:
            found[name] = found[name] | base.get(name, {})
    if run.stage in ("style", "finetune") and run.name is not None:
        own = values.get(f"{run.stage}s.{run.name}", {})
        found["training"] = values.get(run.stage, {}) | own.get("training", {})
        found["data"] = found.get("data", {}) | own.get("data", {})
    found["base"] = {key: value for key, value in base.items() if key not in _OF_BASE}
    return found


def _converted(recorded: Mapping[str, Any]) -> JsonObject:
    """Returns the settings under the names that they have today. evaluation.seed becomes a key of evaluation."""
    found: JsonObject = {}
    for key, value in recorded.items():
        section, _, inner = key.partition(".")
        if inner and section in _SECTIONS:
            found.setdefault(section, {})[inner] = value
        else:
            found[key] = value
    params = YamlText(yaml.safe_dump(found), "dvc.lock")
    convert(params, RELEASE)
    return params.values
