"""The golden outcomes: the figures of each stage on fixed inputs when its version was last raised."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lcmlora import stages
from tests.stages.outcomes import Outcome

FILE = Path(__file__).with_name("golden.json")

# Processors round differently, which moves these figures by less than a thousandth; a change of method moves some of
# them by per cents.
TOLERANCE = 5e-3
# Adam's first steps depend on the sign of each gradient, which rounding decides where the gradient is nearly zero.
TOLERANCE_OF_WEIGHTS = 3e-2
_TRAINED = ("weights", "changes", "unet", "vae", "text_encoder")
_SHOWN = 5  # differences that a message names


def load() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def keep(stage: str, outcome: Outcome) -> None:
    """Writes an outcome to golden.json as that of the stage's present version."""
    every = load() if FILE.is_file() else {}
    every[stage] = {"version": stages.VERSIONS[stage], "outcome": _rounded(outcome)}
    ordered = {name: every[name] for name in stages.VERSIONS if name in every}
    FILE.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def check(stage: str, outcome: Outcome) -> None:
    """Raises AssertionError, with what to do, if the outcome is not that of the stage's version."""
    kept = load()[stage]
    found = differences(kept["outcome"], _rounded(outcome))
    command = f"python -m tests.stages.raise_version {stage}"
    if found:
        raise AssertionError(
            f"{stage}: the same inputs and settings give another result than version {kept['version']} did:\n  "
            + "\n  ".join(found[:_SHOWN])
            + (f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
            + f"\nIf you meant to change the result, run `{command}`: it raises the stage's version, so that every "
            "project runs it again. If not, your change has broken something. See docs/staleness.md"
        )
    if kept["version"] != stages.VERSIONS[stage]:
        raise AssertionError(
            f"{stage}: is version {stages.VERSIONS[stage]} in lcmlora/stages.py, and gives what version "
            f"{kept['version']} gave. Do not edit that number: `{command}` raises it where the result has changed"
        )


def differences(kept: Any, found: Any, place: str = "", tolerance: float = TOLERANCE) -> list[str]:
    """Returns a line for each figure that differs by more than the tolerance."""
    if isinstance(kept, dict) and isinstance(found, dict):
        lines = [f"{place}{key}: is {'missing' if key in kept else 'new'}" for key in kept.keys() ^ found.keys()]
        for key in kept.keys() & found.keys():
            within = TOLERANCE_OF_WEIGHTS if key in _TRAINED else tolerance
            lines += differences(kept[key], found[key], f"{place}{key}.", within)
        return sorted(lines)
    if isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        return [
            line
            for number, (one, other) in enumerate(zip(kept, found, strict=True))
            for line in differences(one, other, f"{place}{number}.", tolerance)
        ]
    if isinstance(kept, float) and isinstance(found, float | int):
        same = math.isclose(kept, found, rel_tol=tolerance, abs_tol=tolerance)
    else:
        same = kept == found
    return [] if same else [f"{place.rstrip('.')}: was {kept!r}, is {found!r}"]


def _rounded(value: Any) -> Any:
    """Returns the value as JSON has it, with numbers of six digits."""
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
