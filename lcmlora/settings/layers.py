"""Settings in layers: package defaults, a family's preset, a section of params.yaml, what one base overrides.

A later layer overrides an earlier one, key by key. Every error names the layer that has its key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject
from lcmlora.io.terminal import shown
from lcmlora.settings.fields import Strict

_MOST_LINES = 20  # of a message
_NO_KEY = re.compile(r"[a-z-]*\[.*\]|str")  # in pydantic's locations: [key], and alternatives as literal['none']

S = TypeVar("S", bound=Strict)
Location = tuple[int | str, ...]


@dataclass(frozen=True)
class Changes:
    """Marks a mapping as changes of settings of this class, for the JSON schema and the documentation.

    extensions: returns, by name, the subclasses with keys of their own that may stand in for the class.
    """

    of: type[Strict]
    extensions: Callable[[], Mapping[str, type[Strict]]] = dict

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = dict(handler.resolve_ref_schema(handler(self.of.__pydantic_core_schema__)))
        keys = dict(found["properties"])
        for name, extension in self.extensions().items():
            extended = handler(extension.__pydantic_core_schema__)["properties"]
            for key in extension.model_fields.keys() - self.of.model_fields.keys():
                entry = extended[key] | {"description": f"{name}: {extended[key].get('description', '')}"}
                # Two extensions may have a key of one name, with different values.
                keys[key] = {"anyOf": [keys[key], entry]} if key in keys else entry
        return found | {"properties": keys}


@dataclass(frozen=True)
class Layer:
    """Some settings, and the place that they come from."""

    where: str  # distill, bases.emoji.distill, preset sdxl
    values: JsonObject

    def has(self, location: Location) -> bool:
        """Returns whether the layer sets this key."""
        values: Any = self.values
        for key in location:
            if not isinstance(values, dict) or key not in values:
                return False
            values = values[key]
        return bool(location)


SECRET = "secret"  # type of the errors of values that may be secrets: `explain` does not quote them


def merge(layers: Sequence[Layer]) -> JsonObject:
    """Returns the settings of all layers. Mappings within them are merged key by key."""
    found: JsonObject = {}
    for layer in layers:
        found = _overridden(found, layer.values)
    return found


def _overridden(settings: JsonObject, changes: JsonObject) -> JsonObject:
    within = {
        key: _overridden(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return settings | changes | within


def combine(cls: type[S], layers: Sequence[Layer]) -> S:
    """Returns the settings of all layers.

    Raises:
        UserError: a key or value does not fit, or one without a default is missing.
    """
    values = merge(layers)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        advice = cls.advice_on_keys(values)
        raise UserError(explain(error, cls, lambda location: origin(layers, location), advice=advice)) from None


def faults(cls: type[Strict], layers: Sequence[Layer]) -> str:
    """Returns the faults of these layers, in the lines of `explain`. Other layers may add the keys that are missing."""
    values = merge(layers)
    try:
        cls.model_validate(values)
    except ValidationError as error:
        advice = cls.advice_on_keys(values)
        return explain(error, cls, lambda location: origin(layers, location), but="missing", advice=advice)
    return ""


def missing_keys(cls: type[Strict], layers: Sequence[Layer]) -> list[str]:
    """Returns the keys without a default that no layer has."""
    try:
        cls.model_validate(merge(layers))
    except ValidationError as error:
        return [".".join(map(str, item["loc"])) for item in error.errors() if item["type"] == "missing"]
    return []


def origin(layers: Sequence[Layer], location: Location) -> str:
    """Returns the place that a key comes from: the last layer that has it, or else the last that has its section."""
    for depth in range(len(location), 0, -1):
        for layer in reversed(layers):
            if layer.has(location[:depth]):
                return layer.where
    return next((layer.where for layer in reversed(layers) if layer.values), layers[-1].where)


def explain(
    error: ValidationError, cls: type[BaseModel], where: Callable[[Location], str], but: str = "", advice: str = ""
) -> str:
    """Returns one line for each error: the key, its value, and what was expected.

    Args:
        cls: the settings that the error is of.
        where: returns the text before a key.
        but: a type of errors that is left out.
        advice: the end of the line about an unknown key of the top level.
    """
    found: dict[str, list[str]] = {}  # by the beginning of the line; a key with alternatives has an error of each
    for item in error.errors():
        # Entries of a list come from one place, so that no other layer gives what is missing in one.
        if item["type"] == but and not any(isinstance(part, int) for part in item["loc"]):
            continue
        unknown = item["loc"][-1:] if item["type"] == "extra_forbidden" else ()  # a key, whatever its name
        known = item["loc"][: len(item["loc"]) - len(unknown)]
        location = (*(part for part in known if not _NO_KEY.fullmatch(str(part))), *unknown)
        key = ".".join(shown(part, 80) for part in location)
        before = where(location)
        path = f"{before}.{key}" if before and key else before or key
        message = shown(item["msg"].removeprefix("Value error, "), 800)  # a check's own may name what it was given
        if item["type"] == "extra_forbidden":
            message = f"there is no such key{advice if advice and len(location) == 1 else _meant(cls, item['loc'])}"
        elif item["type"] == "missing":
            message = "is missing"
        elif item["type"] == "model_type":  # pydantic names its class
            message = "expected an object"
        start = f"{path}: " if path else ""
        if item["type"] not in ("extra_forbidden", "missing", SECRET) and item["loc"] != ():
            start += f"got {shown(repr(item['input']), 200)}: "
        found.setdefault(start, []).append(message)
    lines = [start + ", or ".join(dict.fromkeys(messages)) for start, messages in found.items()]
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(lines[:_MOST_LINES] + more)


def _meant(cls: type[BaseModel], location: Location) -> str:
    """Returns the end of the message about an unknown key: the one beside it that is spelt nearly so, if there is."""
    classes = [cls]
    for part in location[:-1]:
        # Other parts are the keys of a mapping, the numbers of a list, and pydantic's names of alternatives.
        named = [each.model_fields[str(part)].annotation for each in classes if str(part) in each.model_fields]
        classes = [found for annotation in named for found in _settings_in(annotation)] or classes
    return meant(str(location[-1]), [key for each in classes for key in each.model_fields])


def meant(key: str, known: Sequence[str]) -> str:
    """Returns the end of the message about an unknown key: which of the known ones is spelt nearly so, if one is."""
    found = difflib.get_close_matches(key, known, 1, 0.7)
    return f"; did you mean {found[0]}?" if found else ""


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _settings_in(argument)]
