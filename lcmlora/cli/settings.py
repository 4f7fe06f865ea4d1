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
from lcmlora.cli.shell import completion
from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject
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
    model: Annotated[
        str | None,
        typer.Option(help="A base; by default all of `models`.", show_default=False, autocompletion=completion.bases),
    ] = None,
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
    from lcmlora.config import Config
    from lcmlora.projects.settings_reference import configuration_page, json_schema

    if schema:
        print(json.dumps(json_schema(Config), indent=2))
        return
    if docs:
        print(configuration_page(Config), end="")
        return
    context = context_of(call)
    config = context.settings()
    settings = list(list_settings(config, context.project, [model] if model else list(config.models)))
    if key is not None:
        settings = _selected(settings, key)
    if as_json:
        print(json.dumps([asdict(setting) for setting in settings], indent=2))
    else:
        _print_table(settings)
        if key is not None and {setting.key for setting in settings} == {key}:
            say(_description(key))


def list_settings(config: Config, project: Project, models: list[str]) -> Iterator[Setting]:
    """Yields the settings that are the same for all models, then those of each model.

    Raises:
        UserError: there is no such model, or its settings do not fit.
    """
    from lcmlora.config import ENVIRONMENT, SECTIONS

    origins = _Origins.of(project)
    environment = {(section, field): name for section, field, name in ENVIRONMENT if os.environ.get(name)}
    for key, value in _leaves(config.model_dump(mode="json", exclude={*SECTIONS, "bases"})):
        yield _setting(None, key, value, environment.get((key[0], key[-1])) or origins.of_shared(key))
    for model in models:
        yield from _settings_of_base(config, project, model, origins)
        for section in (*(["data"] if config.has_own_data(model) else []), *SECTIONS):
            yield from _settings_of_section(config, model, section, origins)


def _settings_of_base(config: Config, project: Project, model: str, origins: _Origins) -> Iterator[Setting]:
    """Yields the settings of an entry of `bases`, but for its changes of sections."""
    from lcmlora.settings import presets

    completed = presets.complete(model, origins.entry(model), project.root)
    changes = {"data", "encode", "launch", "distill", "evaluation"}
    for key, value in _leaves(config.base(model).model_dump(mode="json", exclude=changes)):
        origin = completed.origins.get(key[0]) or origins.written(("bases", model, *key)) or "default"
        yield _setting(model, ("bases", model, *key), value, origin)


def _settings_of_section(config: Config, model: str, section: str, origins: _Origins) -> Iterator[Setting]:
    from lcmlora.settings import layers

    keys = {section: (section,), f"bases.{model}.{section}": ("bases", model, section)}  # by the name of the layer
    found = config.layers_of(section, model)
    for key, value in _leaves(config.section(section, model).model_dump(mode="json")):
        layer = layers.origin(found, key) if any(layer.has(key) for layer in found) else "default"
        written = origins.written((*keys[layer], *key)) if layer in keys else None
        yield _setting(model, (section, *key), value, written or layer)


@dataclass(frozen=True)
class _Origins:
    """Where params.yaml sets what."""

    file: str
    values: JsonObject
    lines: dict[Key, int]

    @classmethod
    def of(cls, project: Project) -> _Origins:
        from lcmlora.config import read

        path = project.params_file
        return cls(path.name, read(path), _lines(path))

    def entry(self, model: str) -> JsonObject:
        """Returns the entry of a base as it is written; empty where there is none."""
        found: JsonObject = self.values.get("bases", {}).get(model, {})
        return found

    def written(self, key: Key) -> str | None:
        """Returns file, line and key where this is set, None where it is not."""
        return f"{self.file}:{self.lines[key]} {'.'.join(key)}" if key in self.lines else None

    def of_shared(self, key: Key) -> str:
        """Returns where a setting of all models is set: itself, or the nearest list or mapping that encloses it."""
        enclosing = (self.written(key[:depth]) for depth in range(len(key), 1, -1))
        return self.written(key) or next(filter(None, enclosing), "default")


def _setting(model: str | None, key: Key, value: Any, origin: str) -> Setting:
    return Setting(model, ".".join(key), masking.text(value) if isinstance(value, str) else value, origin)


def _leaves(values: JsonObject, before: Key = ()) -> Iterator[tuple[Key, Any]]:
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
    from lcmlora.config import Config
    from lcmlora.projects.settings_reference import json_schema

    schema = json_schema(Config)
    entry = schema
    for part in key.split("."):
        if "$ref" in entry:
            entry = schema["$defs"][entry["$ref"].rsplit("/", 1)[1]]
        inner = entry.get("additionalProperties")
        entry = entry.get("properties", {}).get(part) or (inner if isinstance(inner, dict) else {})
    return str(entry.get("description", ""))


def _print_table(settings: list[Setting]) -> None:
    """Prints a table for each model, in lines that `grep` and a narrow terminal can take."""
    model: str | None = None
    key_width = max(len(setting.key) for setting in settings)
    values = [json.dumps(setting.value) for setting in settings]
    value_width = min(max(map(len, values)), 40)
    for setting, value in zip(settings, values, strict=True):
        if setting.model != model:
            model = setting.model
            say(f"{model}:")
        say(f"{setting.key:{key_width}}  {shown(value, 200):{value_width}}  {setting.origin}")
