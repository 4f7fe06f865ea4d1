"""A base model: brought here, examined, described and loaded."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcmlora.bases.base import (
        Conditioning,
        LoadedBase,
        load,
        pick_device,
        pick_dtype,
        unet_forward,
    )
    from lcmlora.bases.description import Description, describe

_MODULES = {
    "Conditioning": "base",
    "Description": "description",
    "LoadedBase": "base",
    "describe": "description",
    "load": "base",
    "pick_device": "base",
    "pick_dtype": "base",
    "unet_forward": "base",
}

__all__ = [
    "Conditioning",
    "Description",
    "LoadedBase",
    "describe",
    "load",
    "pick_device",
    "pick_dtype",
    "unet_forward",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: the modules need torch, and `lcmlora --help` does not."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"lcmlora.bases.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
