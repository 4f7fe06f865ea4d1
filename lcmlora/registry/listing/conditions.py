"""Conditions on versions, as a person writes them: what the database can decide is in its search."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lcmlora.errors import UserError
from lcmlora.registry.lookup import Version

# Fields of a version that are the tag of the same name.
_TAGS = {"sha256", "objective", "features", "data_digest", "data_dvc", "git_commit", "git_dirty", "dvc_lock", "gate"}
_TAGS |= {"gate_reason", "release_uri"}
_ATTRIBUTES = {"name": "name", "run_id": "run_id", "version": "version_number"}  # of MLflow
_NAME, _PLAIN = re.compile(r"[\w.\-/ ]+"), re.compile(r"[\w.,:;/@+=()\[\] \-]+")  # what needs no quoting in a search


@dataclass(frozen=True)
class Condition:
    """A test of versions.

    search: the same in the language of MLflow's searches; None where only the test decides.
    figure: the figure that the test compares; None where it compares none.
    """

    test: Callable[[Version], bool]
    search: str | None = None
    figure: str | None = None

    def __call__(self, version: Version) -> bool:
        return self.test(version)


def condition(text: str) -> Condition:
    """Returns the test that a text describes: `KEY=VALUE` (a field or a tag), `FIGURE<NUMBER` or `FIGURE>NUMBER`.

    Raises:
        UserError: the text has none of these forms.
    """
    match = re.fullmatch(r"\s*(.+?)\s*([=<>])\s*(.+?)\s*", text)
    if match is None:
        raise UserError(f"{text!r}: expected KEY=VALUE, FIGURE<NUMBER or FIGURE>NUMBER")
    key, sign, value = match.groups()
    if sign == "=":
        return Condition(lambda version: str(version.fact(key)) == value, _search(key, value))
    try:
        limit = float(value)
    except ValueError:
        raise UserError(f"{text!r}: {value!r} is not a number") from None

    def test(version: Version) -> bool:
        figure = version.figure(key)
        return figure is not None and (figure < limit if sign == "<" else figure > limit)

    return Condition(test, figure=key)


def joined(conditions: Iterable[str | None]) -> str | None:
    """Returns the search for versions that meet all conditions; None where each of them is None."""
    return " and ".join(filter(None, conditions)) or None


def _search(key: str, value: str) -> str | None:
    if not _PLAIN.fullmatch(value) or value == "None":  # of a fact that a version lacks
        return None
    if key == "version":
        return f"{_ATTRIBUTES[key]} = {value}" if value.isdecimal() else None
    if key in _ATTRIBUTES:
        return f"{_ATTRIBUTES[key]} = '{value}'"
    is_tag = key in _TAGS or key not in Version.__dataclass_fields__
    return f"tags.`{key}` = '{value}'" if is_tag and _NAME.fullmatch(key) else None
