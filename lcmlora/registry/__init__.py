"""MLflow's registry: versions of adapters, their registration and promotion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcmlora.registry.loading import load_pipeline
    from lcmlora.registry.lookup import (
        Difference,
        Version,
        champion,
        compare,
        condition,
        figures,
        pull,
        resolve,
        versions,
    )

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
    "versions",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: `lcmlora --help` needs none of it."""
    if name == "load_pipeline":
        from lcmlora.registry import loading

        return loading.load_pipeline
    if name in __all__:
        from lcmlora.registry import lookup

        return getattr(lookup, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
