"""The limits of a request to a served model, and of the queue. The server's environment variables set them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lcmlora.errors import UserError

_PREFIX = "LCMLORA_MAX_"
_SEEDS = 1 << 63  # MLflow's `long`


@dataclass(frozen=True)
class Limits:
    """Limits of a request. An environment variable sets each of them: LCMLORA_MAX_STEPS sets `steps`, and so on."""

    prompts: int = 16  # in one request
    characters: int = 2000  # in a prompt; the text encoders read 77 tokens
    steps: int = 50
    guidance: int = 20
    pixels: int = 0  # in one picture; 0 is four times the pixels of the release's resolution
    body: int = 1 << 20  # bytes of a request
    queue: int = 8  # requests that wait while one is drawn
    seconds: int = 60  # from the arrival of a request to the end of its drawing

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """Returns the limits that the environment sets. Raises UserError where one of them is no number.

        `mlflow models serve --timeout` sets `seconds`, too.
        """
        limits = {}
        given = environment.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT")
        if given is not None and given.isascii() and given.isdigit() and int(given):
            limits["seconds"] = int(given)
        for field in fields(cls):
            name = _PREFIX + field.name.upper()
            text = environment.get(name)
            if not text:
                continue
            lowest = 0 if field.name in ("pixels", "queue") else 1
            if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= lowest):
                raise UserError(f"{name}: expected a whole number from {lowest} on, got {text[:100]!r}")
            limits[field.name] = int(text)
        return cls(**limits)

    def check(self, prompts: Sequence[object], params: Mapping[str, Any], resolution: int) -> None:
        """Raises UserError where a request is over a limit, or has a value of the wrong type.

        Args:
            params: steps, guidance, seed, width and height; width and height 0 are the resolution.
            resolution: of the release, in pixels.
        """
        if not 1 <= len(prompts) <= self.prompts:
            raise UserError(f"prompt: expected 1 to {self.prompts} in a request, got {len(prompts)}")
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                raise UserError(f"prompt: expected text, got {repr(prompt)[:100]}")
            if len(prompt) > self.characters:
                raise UserError(f"prompt {number}: expected {self.characters} characters at most, got {len(prompt)}")
            if "\0" in prompt or any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UserError(f"prompt {number}: has a zero character or half a surrogate pair, which are no text")
        for name, value in params.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name}: expected a number, got {repr(value)[:100]}")
            if name != "guidance" and value != int(value):
                raise UserError(f"{name}: expected a whole number, got {value}")
        for name, highest in (("steps", self.steps), ("guidance", self.guidance)):
            if params[name] > highest:
                raise UserError(f"{name}: expected {highest} at most, got {params[name]:g}")
        if not 0 <= params["seed"] < _SEEDS:
            raise UserError(f"seed: expected 0 to {_SEEDS - 1}, got {params['seed']}")
        width, height = (params[name] or resolution for name in ("width", "height"))
        highest = self.pixels or 4 * resolution**2
        if width * height > highest:
            raise UserError(f"width, height: expected {highest} pixels at most, got {width} x {height}")
