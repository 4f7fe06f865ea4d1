"""The words that a shell completes arguments with: names in the project's params.yaml, read without checking it.

A shell calls this at every press of the tab key, so nothing is imported here that takes long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

_MOST_BYTES = 1 << 20


def bases(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of models and bases that begin so."""
    params = _params(ctx)
    return _starting(incomplete, [*_names(params, "models"), *_names(params, "bases")])


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of models that begin so."""
    return _starting(incomplete, _names(_params(ctx), "models"))


def styles(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of styles that begin so."""
    return _starting(incomplete, _names(_params(ctx), "styles"))


def finetunes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of fine-tunes that begin so."""
    return _starting(incomplete, _names(_params(ctx), "finetunes"))


def variations(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of styles and fine-tunes that begin so."""
    return styles(ctx, incomplete) + finetunes(ctx, incomplete)


def registered(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns the names of registered models that begin so."""
    names = [f"lcm-lora-{name.removeprefix('lcm-lora-')}" for name in _names(_params(ctx), "models")]
    return _starting(incomplete, names)


def adapters(ctx: typer.Context, incomplete: str) -> list[str]:
    """Returns names of adapters that begin so: MODEL and MODEL@champion. The shell itself completes paths."""
    params = _params(ctx)
    registry = params.get("registry")
    alias = registry.get("alias", "champion") if isinstance(registry, dict) else "champion"
    names = _names(params, "models")
    return _starting(incomplete, [*names, *(f"{name}@{alias}" for name in names)])


def _starting(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _names(params: dict[str, Any], key: str) -> list[str]:
    found = params.get(key)
    return [name for name in found if isinstance(name, str)] if isinstance(found, list | dict) else []


def _params(ctx: typer.Context) -> dict[str, Any]:
    """Returns what params.yaml has; nothing where it cannot be read, for a shell has no place for an error."""
    import yaml

    options = ctx.find_root().params
    file = options.get("params") or Path(options.get("project") or ".", "params.yaml")
    try:
        with Path(file).open("rb") as opened:
            found = yaml.safe_load(opened.read(_MOST_BYTES))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
