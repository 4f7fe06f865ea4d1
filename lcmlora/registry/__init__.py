"""MLflow's registry: versions of adapters, their registration and promotion."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcmlora.registry.downloads.pulling import figures, pull, verify
    from lcmlora.registry.listing.conditions import condition
    from lcmlora.registry.listing.search import versions
    from lcmlora.registry.loading import load_pipeline
    from lcmlora.registry.lookup import Difference, Version, champion, compare, resolve

_MODULES = {
    "Difference": "lookup",
    "Version": "lookup",
    "champion": "lookup",
    "compare": "lookup",
    "condition": "listing.conditions",
    "figures": "downloads.pulling",
    "load_pipeline": "loading",
    "pull": "downloads.pulling",
    "resolve": "lookup",
    "verify": "downloads.pulling",
    "versions": "listing.search",
}

__all__ = [
    "Difference",
    "Version",
    "champion",
    "compare",
    "condition",
    "figures",
    "load_pipeline",
    "pull",
    "resolve",
    "verify",
    "versions",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: `lcmlora --help` needs none of it."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"lcmlora.registry.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
