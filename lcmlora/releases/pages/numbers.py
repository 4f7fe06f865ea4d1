"""Numbers as the report page shows them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from lcmlora.io.documents import Interval

MINUS = "\N{MINUS SIGN}"
_NONE = "\N{EN DASH}"


def fixed(value: float | None, places: int = 3, *, signed: bool = False) -> str:
    """Returns a number with a true minus sign, `–` for none. What rounds to zero has no sign."""
    if value is None:
        return _NONE
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def span(interval: Interval | None, places: int = 3) -> str:
    """Returns `low to high`, or nothing where there is no interval."""
    return f"{fixed(interval[0], places)} to {fixed(interval[1], places)}" if interval else ""


def milliseconds(seconds: float | None) -> str:
    """Returns seconds as milliseconds with three figures, `–` for none."""
    if seconds is None:
        return _NONE
    value = 1000 * seconds
    return fixed(value, max(0, min(3, 2 - math.floor(math.log10(value)))) if value > 0 else 0)


def over(value: float, whole: float, form: str) -> str:
    """Returns value / whole in this form, `–` where there is nothing to divide by."""
    return form % (value / whole) if whole else _NONE


def decimals(values: Iterable[float]) -> int:
    """Returns how many decimals show three figures of the median of these distances, zeros apart."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return min(6, max(0, 2 - math.floor(math.log10(statistics.median(sizes))))) if sizes else 2
