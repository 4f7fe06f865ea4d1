"""Settings for tests: those of the emoji base, for whatever bases a test has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lcmlora.config import SECTIONS

PARAMS = Path(__file__).parents[2] / "params.yaml"


def raw() -> dict[str, Any]:
    """Returns what the project's params.yaml has, with every section; the emoji base's own numbers are all models'."""
    found: dict[str, Any] = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    emoji = found["bases"]["emoji"]
    found |= {section: emoji.pop(section, {}) for section in SECTIONS}
    return found | {section: found.get(section, {}) for section in ("gate", "registry", "publish", "flow")}
