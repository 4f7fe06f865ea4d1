"""Production pipeline for LCM-LoRA: distil, evaluate, release and register acceleration adapters.

`__all__` has the names that other programs may rely on; everything else may change with any version. A name is imported
when it is used first: none of them needs torch, until a base or a pipeline is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcmlora import bases, config, plugins, registry
    from lcmlora.errors import Unavailable, UserError
    from lcmlora.project import Project
    from lcmlora.registry import load_pipeline

__version__ = "0.2.0"

__all__ = [
    "Project",
    "Unavailable",
    "UserError",
    "bases",
    "config",
    "load_pipeline",
    "plugins",
    "registry",
]

_MODULES = {
    "Project": "lcmlora.project",
    "Unavailable": "lcmlora.errors",
    "UserError": "lcmlora.errors",
    "load_pipeline": "lcmlora.registry",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in __all__:
        return importlib.import_module(f"lcmlora.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
