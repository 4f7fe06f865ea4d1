"""The base class of all settings, strict and frozen, and the types of their fields."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from lcmlora import names
from lcmlora.plugins import Table


@dataclass(frozen=True)
class OneOf:
    """Annotates a name of a table of classes (lcmlora/plugins.py)."""

    table: Table

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.table.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(schema) | {"examples": self.table.names}


class Strict(BaseModel):
    """Unknown keys are errors, and nothing changes after loading.

    The docstring under a field is its description: `lcmlora config`, docs/configuration.md and the JSON schema show it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: yes` is true in YAML, and would be taken for 1."""
        if isinstance(value, bool) and info.field_name:
            kind = cls.model_fields[info.field_name].annotation
            if {int, float} & {kind, *get_args(kind)} and bool not in (kind, *get_args(kind)):
                raise ValueError(f"expected a number, not {str(value).lower()} (as yes, no, on and off are read)")
        return value

    @classmethod
    def advice_on_keys(cls, values: Mapping[str, Any]) -> str:
        """Returns the end of the message about an unknown key among these values."""
        del values
        return ""


def _named(name: str) -> str:
    if wrong := names.fault(name):
        raise ValueError(wrong)
    return name


def _quotable(text: str) -> str:
    if found := re.search(r"[^ -~\u00a0-\U0010ffff]|[\"`<>|\\\u2028\u2029\ud800-\udfff]", text):
        raise ValueError(f"has {found[0]!a}, which cannot stand in a model card's text and examples")
    return text


def _as_text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Device = Literal["auto", "cpu", "cuda"]
Kind = Literal["style", "finetune"]
Name = Annotated[str, AfterValidator(_named)]  # of what becomes a path, a command's word or a registry's entry
PathText = Annotated[str, BeforeValidator(_as_text)]
Quotable = Annotated[str, Field(max_length=1024), AfterValidator(_quotable)]  # of what is quoted in a card
