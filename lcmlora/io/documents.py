"""Typed, frozen documents for the JSON files of this package: one class for each format, one way to read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from lcmlora.errors import UserError
from lcmlora.io.files import write_json
from lcmlora.io.parsing import JsonObject, as_object, read_json
from lcmlora.io.terminal import shown


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return value


# Whole numbers stay whole, so that what was read is written again as the same bytes.
Number = Annotated[float, PlainValidator(_number)]
Interval = Annotated[tuple[Number, Number], Field(strict=False)]  # low and high; a list in JSON


class Document(BaseModel):
    """The content of a JSON file of this package, or of an object in one. Keys that a later version added are kept.

    A field that a file may lack has a default. It is written only if it was given.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", protected_namespaces=())

    @classmethod
    def parse(cls, value: Any, place: str) -> Self:
        """Returns the document. Raises UserError, one line with the place, the key and the value that does not fit."""
        try:
            return cls.model_validate(as_object(value, place))
        except ValidationError as error:
            first = error.errors()[0]
        key = ".".join(shown(part, 80) for part in first["loc"] if part != "[key]")
        if first["type"] == "missing":
            raise UserError(f"{place}: {key}: is missing")
        told = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place}: {key}: got {shown(repr(first['input']), 200)}: {told}")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Returns the document in a file. Raises UserError where it is missing, damaged or does not fit."""
        return cls.parse(read_json(path), str(path))

    def plain(self) -> JsonObject:
        """Returns the document as plain data: the fields that were given, without the defaults of the others."""
        return self.model_dump(exclude_unset=True)

    def fields(self) -> dict[str, Any]:
        """Returns the fields by name, for another document that has the same fields and more."""
        return dict(iter(self))

    def write(self, path: Path) -> None:
        """Writes the document atomically, with sorted keys."""
        write_json(path, self.plain())
