"""The figures that lists of versions show, as a tag of the version.

A run has hundreds of figures, and MLflow returns none or all of them: a list that read them from runs would take most
of its time for figures that it does not show. All figures are those of the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from lcmlora.io.parsing import Malformed, parse_json

TAG = "main_figures"
_NAMES = re.compile(r"(excess|retrieval)\.student_\d+")


def tag(metrics: Mapping[str, float]) -> dict[str, str]:
    """Returns the tag of a version.

    Args:
        metrics: all figures of its run by their names in MLflow.
    """
    found = {name: value for key, value in metrics.items() if _NAMES.fullmatch(name := key.rpartition("/")[2])}
    return {TAG: json.dumps(found, sort_keys=True)}


def read(tags: Mapping[str, str]) -> dict[str, float] | None:
    """Returns the figures in the tags of a version; None where it has none, as those that lcmlora 0.1.0 registered."""
    try:
        found = parse_json(tags.get(TAG, "null"))
    except Malformed:  # anybody may write a tag
        return None
    if not isinstance(found, dict) or not all(isinstance(value, int | float) for value in found.values()):
        return None
    return {str(name): float(value) for name, value in found.items()}


def is_main(name: str) -> bool:
    """Returns whether a figure, by its name without features, is among those in the tag."""
    return _NAMES.fullmatch(name) is not None
