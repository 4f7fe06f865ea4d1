"""Settings in layers: package defaults, a family's preset, a section of params.yaml, a base's changes of it.

A later layer goes before an earlier one, key by key. Every error names the layer that its key stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from lcmlora.errors import UserError
from lcmlora.io.terminal import shown

_MOST_LINES = 20  # of a message

S = TypeVar("S", bound=BaseModel)
Location = tuple[int | str, ...]


@dataclass(frozen=True)
class Changes:
    """Marks a mapping as changes of settings of this class, for the JSON schema and the documentation."""

    of: type[BaseModel]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(self.of.__pydantic_core_schema__)


@dataclass(frozen=True)
class Layer:
    """Some settings, and where they stand."""

    where: str  # distill, bases.emoji.distill, preset sdxl
    values: dict[str, Any]

    def has(self, location: Location) -> bool:
        """Returns whether it says anything about this key."""
        values: Any = self.values
        for key in location:
            if not isinstance(values, dict) or key not in values:
                return False
            values = values[key]
        return bool(location)


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """Returns the settings of all layers; of settings within settings, each key from the last layer that has it."""
    found: dict[str, Any] = {}
    for layer in layers:
        found = _merge(found, layer.values)
    return found


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    within = {
        key: _merge(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return settings | changes | within


def combine(cls: type[S], layers: Sequence[Layer]) -> S:
    """Returns the settings of all layers.

    Raises:
        UserError: a key or value does not fit, or one without a default is missing.
    """
    try:
        return cls.model_validate(merged(layers))
    except ValidationError as error:
        raise UserError(explain(error, lambda location: place(layers, location))) from None


def faults(cls: type[BaseModel], layers: Sequence[Layer]) -> str:
    """Returns what does not fit in these layers, as `explain` says it, though other layers may give what is missing."""
    try:
        cls.model_validate(merged(layers))
    except ValidationError as error:
        return explain(error, lambda location: place(layers, location), but="missing")
    return ""


def missing(cls: type[BaseModel], layers: Sequence[Layer]) -> list[str]:
    """Returns the keys without a default that no layer has."""
    try:
        cls.model_validate(merged(layers))
    except ValidationError as error:
        return [".".join(map(str, item["loc"])) for item in error.errors() if item["type"] == "missing"]
    return []


def place(layers: Sequence[Layer], location: Location) -> str:
    """Returns where a key stands: in the last layer that has it, or else in the last that has what it belongs to."""
    for depth in range(len(location), 0, -1):
        for layer in reversed(layers):
            if layer.has(location[:depth]):
                return layer.where
    return next((layer.where for layer in reversed(layers) if layer.values), layers[-1].where)


def explain(error: ValidationError, where: Callable[[Location], str], but: str = "") -> str:
    """Returns one line per error: the key, the value that stands there, and what was expected.

    Args:
        where: what stands before the key at this place.
        but: a type of errors that is left out.
    """
    lines = []
    for item in error.errors():
        if item["type"] == but:
            continue
        location = tuple(part for part in item["loc"] if part != "[key]")
        key = ".".join(shown(part, 80) for part in location)
        before = where(location)
        path = f"{before}.{key}" if before and key else before or key
        told = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: there is no such key")
        elif item["type"] == "missing":
            lines.append(f"{path}: is missing")
        else:
            value = "" if item["loc"] == () else f"got {shown(repr(item['input']), 200)}: "
            lines.append(f"{path}: {value}{told}" if path else f"{value}{told}")
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(lines[:_MOST_LINES] + more)
