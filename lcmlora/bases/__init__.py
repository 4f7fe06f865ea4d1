"""Base models: fetched, examined, described and loaded."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lcmlora import extras

if TYPE_CHECKING:
    from lcmlora.bases.base import (
        LoadedBase,
        load,
        pick_device,
        pick_dtype,
    )
    from lcmlora.bases.description import Description, describe
    from lcmlora.bases.families import Conditioning

_MODULES = {
    "Conditioning": "families",
    "Description": "description",
    "LoadedBase": "base",
    "describe": "description",
    "load": "base",
    "pick_device": "base",
    "pick_dtype": "base",
}

__all__ = [
    "Conditioning",
    "Description",
    "LoadedBase",
    "describe",
    "load",
    "pick_device",
    "pick_dtype",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: most modules need torch, and `lcmlora --help` does not. Raises MissingExtra without it."""
    if name in _MODULES:
        with extras.explaining_imports():
            return getattr(importlib.import_module(f"lcmlora.bases.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
