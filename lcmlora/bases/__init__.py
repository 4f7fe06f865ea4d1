"""A base model: brought here, examined, described and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcmlora.bases.base import (
        Conditioning,
        Description,
        LoadedBase,
        describe,
        load,
        pick_device,
        pick_dtype,
        unet_config,
        unet_forward,
        write,
    )

__all__ = [
    "Conditioning",
    "Description",
    "LoadedBase",
    "describe",
    "load",
    "pick_device",
    "pick_dtype",
    "unet_config",
    "unet_forward",
    "write",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: the module needs torch, and `lcmlora --help` does not."""
    if name in __all__:
        from lcmlora.bases import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
