"""Prefect flows: the order of the tasks, what happens when one fails, and what is shown at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcmlora.errors import UserError

if TYPE_CHECKING:
    from lcmlora.config import Config


def choose(settings: Config, models: list[str] | None) -> list[str]:
    """Returns the named models, all of them by default. Raises UserError for one that is not in params.yaml."""
    for model in models or ():
        if model not in settings.models:
            hint = "add it there" if model in settings.bases else f"known bases: {', '.join(settings.bases)}"
            raise UserError(f"unknown model {model!r}: params.yaml `models` has {', '.join(settings.models)}; {hint}")
    return list(dict.fromkeys(models or settings.models))


def name_of(model: str) -> str:
    """Returns the registered model of a model's versions, such as lcm-lora-emoji."""
    return f"lcm-lora-{model.removeprefix('lcm-lora-')}"


def has_server() -> bool:
    """Returns whether a Prefect server is configured. The temporary server of a single run has no schedules."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())
