"""The stages of a dvc.yaml written out: one for each model, style and fine-tune, as DVC names and runs them.

DVC does the same when it runs them. This package does not import it, and the text may be of a dvc.yaml that is not
written yet.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject, as_object

_TEMPLATE = re.compile(r"\$\{([^}]+)\}")
_RESOLVED = "resolved.yaml"


@dataclass(frozen=True)
class Stage:
    """A stage as DVC runs it. Paths are relative to the project."""

    name: str  # encode@emoji
    command: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    entry: str | None  # its key in resolved.yaml; None for the stage that writes the file
    frozen: bool = False  # DVC runs it only if asked to


def expanded(dvc_yaml: JsonObject, params: JsonObject) -> list[Stage]:
    """Returns the stages of a dvc.yaml.

    Args:
        params: the values of params.yaml, which templates like ${models} stand for.

    Raises:
        UserError: a template stands for nothing in params.yaml, or a stage is not laid out as lcmlora's are.
    """
    described = as_object(dvc_yaml.get("stages", {}), "dvc.yaml: stages")
    return [stage for name, raw in described.items() for stage in _stages(name, raw, params)]


def _stages(name: str, raw: Any, params: JsonObject) -> Iterator[Stage]:
    stage = as_object(raw, f"dvc.yaml: {name}")
    if "matrix" in stage:
        axes = {axis: _listed(values, params) for axis, values in stage["matrix"].items()}
        for values in itertools.product(*axes.values()):
            item = dict(zip(axes, values, strict=True))
            yield _stage(f"{name}@{'-'.join(values)}", stage, _Context(params, {"item": item}))
    elif "foreach" in stage:
        done = as_object(stage.get("do"), f"dvc.yaml: {name}: do")
        for key, item in as_object(stage["foreach"], f"dvc.yaml: {name}: foreach").items():
            yield _stage(f"{name}@{key}", done, _Context(params, {"key": key, "item": item}))
    else:
        yield _stage(name, stage, _Context(params, {}))


def _listed(values: Any, params: JsonObject) -> list[str]:
    if isinstance(values, str) and (template := _TEMPLATE.fullmatch(values)):
        values = _Context(params, {}).value(template[1])
    if not isinstance(values, list):
        raise UserError(f"dvc.yaml: expected a list of names, got {values!r}")
    return [str(value) for value in values]


@dataclass(frozen=True)
class _Context:
    """What templates stand for."""

    params: JsonObject
    loop: JsonObject

    def value(self, key: str) -> Any:
        value: Any = self.params | self.loop
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"params.yaml: {key}: is missing, and dvc.yaml reads it")
            value = value[part]
        return value

    def filled(self, text: str) -> str:
        return _TEMPLATE.sub(lambda found: _as_words(self.value(found[1])), text)


def _as_words(value: Any) -> str:
    """Returns a value as DVC puts it into a command: a mapping as options."""
    if isinstance(value, dict):
        return " ".join(f"--{key} {shlex.quote(str(inner))}" for key, inner in value.items())
    return str(value)


def _stage(name: str, stage: JsonObject, context: _Context) -> Stage:
    entries = [key for each in stage.get("params", ()) if isinstance(each, dict) for key in each.get(_RESOLVED, ())]
    outputs = [path for kind in ("outs", "metrics", "plots") for path in stage.get(kind, ())]
    return Stage(
        name,
        context.filled(str(stage.get("cmd", ""))),
        tuple(context.filled(_path(each)) for each in stage.get("deps", ())),
        tuple(context.filled(_path(each)) for each in outputs),
        context.filled(entries[0]) if entries else None,
        bool(stage.get("frozen")),
    )


def _path(entry: Any) -> str:
    """Returns the path of an input or output, which may have options."""
    return next(iter(entry)) if isinstance(entry, dict) else str(entry)
