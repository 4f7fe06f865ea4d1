"""Prefect flows: the order of the tasks, what happens when one fails, and what a person is told at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcmlora.errors import UserError

if TYPE_CHECKING:
    from lcmlora.config import Config


def choose(settings: Config, models: list[str] | None) -> list[str]:
    """Returns the models to work on, by default all. Raises UserError where one is not listed in params.yaml."""
    for model in models or ():
        if model not in settings.models:
            hint = "add it there" if model in settings.bases else f"known bases: {', '.join(settings.bases)}"
            raise UserError(f"unknown model {model!r}: params.yaml `models` has {', '.join(settings.models)}; {hint}")
    return list(dict.fromkeys(models or settings.models))


def name_of(model: str) -> str:
    """Returns the name under which a model's versions are registered."""
    return f"lcm-lora-{model.removeprefix('lcm-lora-')}"
