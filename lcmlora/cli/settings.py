"""`lcmlora config`: the settings of every model, and where each comes from. Heavy imports happen inside the verb."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcmlora import masking
from lcmlora.cli.context import context_of
from lcmlora.errors import UserError
from lcmlora.io.terminal import say, shown
from lcmlora.project import Project

if TYPE_CHECKING:
    from lcmlora.config import Config

Key = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One setting with its value."""

    model: str | None  # None where it is the same for all
    key: str
    value: Any
    origin: str  # default, preset sdxl, params.yaml:12 bases.emoji.distill.lr, MLFLOW_TRACKING_URI


def print_settings(
    call: typer.Context,
    key: Annotated[
        str | None, typer.Argument(help="A setting or section, e.g. distill.lr or data.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="A base; by default all of `models`.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object for each setting.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of params.yaml.")] = False,
    docs: Annotated[bool, typer.Option("--docs", help="Print docs/configuration.md.")] = False,
) -> None:
    """Print the settings of each model, with where each comes from: params.yaml, a family's preset, the default.

    Examples:

      lcmlora config                             all settings of all models

      lcmlora config distill.lr                  one setting, with its description

      lcmlora config --model sdxl evaluation     a section of a base that need not be among `models`

      lcmlora config --schema > params.schema.json
    """
    from lcmlora.cli import reference
    from lcmlora.config import Config

    if schema:
        print(json.dumps(reference.schema(Config), indent=2))
        return
    if docs:
        print(reference.document(Config), end="")
        return
    context = context_of(call)
    settings = context.settings()
    found = list(listed(settings, context.project, [model] if model else list(settings.models)))
    if key is not None:
        found = _selected(found, key)
    if as_json:
        print(json.dumps([asdict(setting) for setting in found], indent=2))
    else:
        _show(found)
        if key is not None and len({setting.key for setting in found}) == 1 and found[0].key == key:
            say(_description(key))


def listed(settings: Config, project: Project, models: list[str]) -> Iterator[Setting]:
    """Returns the settings that are the same for all, then those of each model.

    Raises:
        UserError: there is no such model, or its settings do not fit.
    """
    from lcmlora import config
    from lcmlora.settings import layers, presets

    raw = config.read(project.params_file)
    lines = _lines(project.params_file)
    name = project.params_file.name

    def written(key: Key) -> str | None:
        """Returns the file, line and key where params.yaml sets this, or None if it does not."""
        return f"{name}:{lines[key]} {'.'.join(key)}" if key in lines else None

    environment = {
        (section, field): variable for section, field, variable in config.ENVIRONMENT if os.environ.get(variable)
    }
    plain = settings.model_dump(mode="json", exclude={*config.SECTIONS, "bases"})
    for key, value in _leaves(plain):
        origin = environment.get((key[0], key[-1])) or written(key) or _around(key, written) or "default"
        yield _setting(None, key, value, origin)
    for model in models:
        base = settings.base(model)
        entry = raw.get("bases", {}).get(model, {})
        completed = presets.complete(model, entry, project.root)
        changed = {"data", "encode", "launch", "distill", "evaluation"}  # which are among the sections below
        for key, value in _leaves(base.model_dump(mode="json", exclude=changed)):
            origin = completed.origins.get(key[0]) or written(("bases", model, *key)) or "default"
            yield _setting(model, ("bases", model, *key), value, origin)
        for section in [*(["data"] if settings.has_own_data(model) else []), *config.SECTIONS]:
            places = {section: (section,), f"bases.{model}.{section}": ("bases", model, section)}
            found = settings.layers_of(section, model)
            for key, value in _leaves(settings.section(section, model).model_dump(mode="json")):
                where = layers.place(found, key) if any(layer.has(key) for layer in found) else "default"
                stands = written((*places[where], *key)) if where in places else None
                yield _setting(model, (section, *key), value, stands or where)


def _around(key: Key, written: Any) -> str | None:
    """Returns where params.yaml sets the nearest list or mapping that encloses this key, or None if it does not."""
    return next((found for depth in range(len(key) - 1, 1, -1) if (found := written(key[:depth]))), None)


def _setting(model: str | None, key: Key, value: Any, origin: str) -> Setting:
    return Setting(model, ".".join(key), masking.text(value) if isinstance(value, str) else value, origin)


def _leaves(values: dict[str, Any], before: Key = ()) -> Iterator[tuple[Key, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*before, key))
        else:
            yield (*before, key), value


def _lines(path: Path) -> dict[Key, int]:
    """Returns the line of each key of a YAML file that has been read before."""
    import yaml

    found: dict[Key, int] = {}

    def walk(node: yaml.Node, before: Key) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            found[(*before, key.value)] = key.start_mark.line + 1
            walk(value, (*before, key.value))

    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, ())
    return found


def _selected(settings: list[Setting], key: str) -> list[Setting]:
    found = [setting for setting in settings if setting.key == key or setting.key.startswith(f"{key}.")]
    if not found:
        import difflib

        keys = {".".join(s.key.split(".")[:depth]) for s in settings for depth in range(1, s.key.count(".") + 2)}
        close = difflib.get_close_matches(key, sorted(keys), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; `lcmlora config` prints all of them"
        raise UserError(f"{shown(key, 80)}: there is no such setting{hint}")
    return found


def _description(key: str) -> str:
    """Returns the description of a setting; nothing where it is a key of a free mapping."""
    from lcmlora.cli.reference import schema
    from lcmlora.config import Config

    told = schema(Config)
    entry: dict[str, Any] = told
    for part in key.split("."):
        if "$ref" in entry:
            entry = told["$defs"][entry["$ref"].rsplit("/", 1)[1]]
        inner = entry.get("additionalProperties")
        entry = entry.get("properties", {}).get(part) or (inner if isinstance(inner, dict) else {})
    return str(entry.get("description", ""))


def _show(settings: list[Setting]) -> None:
    """Prints a table for each model, in lines that `grep` and a narrow terminal can take."""
    model: str | None = None
    width = max(len(setting.key) for setting in settings)
    values = [json.dumps(setting.value) for setting in settings]
    broad = min(max(map(len, values)), 40)
    for setting, value in zip(settings, values, strict=True):
        if setting.model != model:
            model = setting.model
            say(f"{model}:")
        say(f"{setting.key:{width}}  {shown(value, 200):{broad}}  {setting.origin}")
