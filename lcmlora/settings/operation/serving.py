"""Settings of `serving`: what is kept of production's prompts. No stage's result depends on them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lcmlora.settings.fields import Strict


class Serving(Strict):
    """What `lcmlora serve` keeps of the prompts that it draws, and when `watch` says that they have drifted."""

    keep_prompts: Literal["off", "hashes", "text"] = "off"
    """What is kept of the prompts: nothing, keyed hashes, or their text. What people write may be personal data: before
    you keep text, see that you may, and who can read the folder."""
    prompts: Annotated[str, Field(min_length=1)] = "prompts"
    """The folder in which they are kept, for nobody else to read. It does not belong in Git."""
    prompts_a_day: Annotated[int, Field(ge=50, le=1_000_000)] = 500
    """Prompts that are kept of one day and one folder: a fair sample of all of the day."""
    prompt_days: Annotated[int, Field(ge=1, le=3650)] = 30
    """Days after which they are deleted."""
    drift_days: Annotated[int, Field(ge=1, le=365)] = 7
    """Days whose prompts are compared with the training captions at once, and no second time."""
    drift_alarms: Annotated[float, Field(ge=0.001, le=0.5)] = 0.01
    """The share of comparisons that say drift by chance alone, where prompts are like the captions."""

    @field_validator("keep_prompts", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads a plain `off`
