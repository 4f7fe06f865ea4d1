"""All settings for a reader: the JSON schema of params.yaml for editors, and docs/configuration.md, from one source.

`lcmlora config --schema` and `lcmlora config --docs` print them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaValue

from lcmlora.settings import presets

_FAMILY_SECTIONS = ("encode", "distill", "evaluation", "style", "finetune")
_REQUIRED = ["data", "models"]

_HEAD = """\
# Configuration

`lcmlora config --docs` writes this page, from the descriptions beside the settings in `lcmlora/settings`.

Put into `params.yaml` what differs from the defaults below. For a model, a setting comes from the last of these that
has it:

1. the default;
2. the preset of the base's family;
3. the section of `params.yaml`, for all models;
4. the section in the base's entry, `bases.NAME.SECTION`, for this model.

A base with `data` of its own learns from other pictures than the other models:
[Pictures of its own for one model](data.md#pictures-of-its-own-for-one-model).

`lcmlora config` prints all settings and where each comes from; `lcmlora config distill.lr` prints one.

## Families

A base gets the settings of its family. You need not name the family of a published base, nor of a folder or
`.safetensors` file whose UNet has the width of one. For another base, write `like: sdxl` (or `sd15`, `sd21`).

"""


def json_schema(settings: type[BaseModel]) -> JsonSchemaValue:
    """Returns the JSON schema of params.yaml. Only what no default, preset or file can tell is required."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | _relaxed(settings.model_json_schema()) | {"title": "params.yaml of lcmlora", "required": _REQUIRED}


def _relaxed(value: Any) -> Any:
    """Returns a schema without required keys and generated titles, and with descriptions in one line."""
    if isinstance(value, list):
        return [_relaxed(each) for each in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        if key in ("required", "title") and isinstance(inner, list | str):
            continue
        is_text = key == "description" and isinstance(inner, str)
        found[key] = " ".join(inner.split()) if is_text else _relaxed(inner)
    return found


def configuration_page(settings: type[BaseModel]) -> str:
    """Returns docs/configuration.md."""
    schema = json_schema(settings)
    parts = [_HEAD + _families()]
    top_level = {}
    for name, entry in schema["properties"].items():
        fields = _properties(entry, schema)
        if fields:
            parts.append(f"## `{name}`\n\n{_description(entry, schema)}\n\n{_table(fields, schema, name)}")
        else:
            top_level[name] = entry
    parts.insert(1, f"## Top level\n\n{_table(top_level, schema, '')}")
    return "\n".join(parts)


def _families() -> str:
    known = presets.load()
    rows = ["| key | " + " | ".join(f"`{name}`" for name in known.families) + " |"]
    rows.append("|---" * (len(known.families) + 1) + "|")
    rows.append("| for | " + " | ".join(family.title for family in known.families.values()) + " |")
    rows.append("| `resolution` | " + " | ".join(str(family.resolution) for family in known.families.values()) + " |")
    for section in _FAMILY_SECTIONS:
        keys = dict.fromkeys(key for family in known.families.values() for key in family.sections.get(section, {}))
        for key in keys:
            values = [family.sections.get(section, {}).get(key) for family in known.families.values()]
            cells = " | ".join("the default" if value is None else _value(value) for value in values)
            rows.append(f"| `{section}.{key}` | {cells} |")
    published = "\n".join(
        f"* `{name}`: {base['source']} at {base['revision'][:12]}, like `{base['like']}`"
        for name, base in known.bases.items()
    )
    return "\n".join(rows) + f"\n\nPublished bases, which need no entry under `bases`:\n\n{published}\n"


def _table(fields: JsonSchemaValue, schema: JsonSchemaValue, section: str) -> str:
    rows = ["| key | value | default | description |", "|---|---|---|---|"]
    for key, entry in _flat(fields, schema, ""):
        rows.append(f"| `{key}` | {_type(entry)} | {_default(key, entry, section)} | {_description(entry, schema)} |")
    return "\n".join(rows) + "\n"


def _flat(fields: JsonSchemaValue, schema: JsonSchemaValue, prefix: str) -> Iterator[tuple[str, JsonSchemaValue]]:
    for name, entry in fields.items():
        inner = {} if _repeats(prefix, name) else _properties(entry, schema)
        if inner and "default" in entry and entry["default"] is None:
            yield f"{prefix}{name}", entry
        if inner:
            yield from _flat(inner, schema, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


def _repeats(prefix: str, name: str) -> bool:
    """Returns whether a key is a mapping of changes to a section that has a table of its own."""
    return (prefix == "NAME." and name in (*_FAMILY_SECTIONS[:3], "launch", "data", "training")) or name == "real"


def _properties(entry: JsonSchemaValue, schema: JsonSchemaValue) -> JsonSchemaValue:
    """Returns the keys of a mapping; those of a mapping by name under NAME."""
    for option in (entry, *entry.get("anyOf", ())):
        option = _dereferenced(option, schema)
        if "properties" in option:
            return dict(option["properties"])
        inner = option.get("additionalProperties")
        if isinstance(inner, dict) and "properties" in _dereferenced(inner, schema):
            return {"NAME": inner}
    return {}


def _dereferenced(entry: JsonSchemaValue, schema: JsonSchemaValue) -> JsonSchemaValue:
    return dict(schema["$defs"][entry["$ref"].rsplit("/", 1)[1]]) if "$ref" in entry else entry


def _description(entry: JsonSchemaValue, schema: JsonSchemaValue) -> str:
    return str(entry.get("description") or _dereferenced(entry, schema).get("description", "")).replace("|", "\\|")


def _default(key: str, entry: JsonSchemaValue, section: str) -> str:
    if (section, key) == ("bases", "NAME.resolution"):
        return "of the folder or the family"
    if "default" in entry:
        return _value(entry["default"])
    return "of the family" if section in _FAMILY_SECTIONS else "needed"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{}" if not value else "{" + ", ".join(f"{key}: {_value(inner)}" for key, inner in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(entry: JsonSchemaValue) -> str:
    """Returns in words which values fit."""
    if options := entry.get("anyOf") or entry.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options))
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "examples" in entry:
        return ", ".join(f"`{value}`" for value in entry["examples"])
    if entry.get("type") == "array":
        items = entry.get("items") or (entry.get("prefixItems") or [{}])[0]
        return f"list of {_type(items)}"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    kind = str(entry.get("type", "mapping"))
    name = names.get(kind, kind).replace("object", "mapping")
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {_value(entry[key])}" for key, word in words.items() if key in entry]
    return ", ".join([name, *limits])
