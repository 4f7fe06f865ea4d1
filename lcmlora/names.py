"""The names that become paths, commands and entries of a registry: one rule for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lcmlora.errors import UserError
from lcmlora.io.terminal import shown

RULE = "letters, digits, '.', '_' and '-', 64 at most, the first a letter or digit, the last no '.'"

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
# Devices on Windows, whatever ending they have, where a project may be cloned as well.
_DEVICE = re.compile(r"(?:CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?:\..*)?", re.IGNORECASE)


def fault(name: object) -> str | None:
    """Returns what is wrong with a name, None where nothing is.

    A name is part of a path, a word of a command and a word of a page, and means nothing else in any of them.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"is no name: expected {RULE}"
    if _DEVICE.fullmatch(name):
        return "is no name: Windows has a device that is called so"
    return None


def check(name: str, what: str) -> str:
    """Returns the name. Raises UserError, beginning with `what`, where it is none."""
    if wrong := fault(name):
        raise UserError(f"{what}: {shown(repr(name), 80)} {wrong}")
    return name


def arguments(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line with `--model NAME` and `--name NAME` as the arguments that they stand for.

    DVC quotes for the shell what it writes as options (`${item}` in dvc.yaml), and not what is written out there.

    Raises:
        UserError: such an option has no name after it.
    """
    given, rest, left = [], [], iter(words)
    for word in left:
        if word in ("--model", "--name"):
            given.append(check(next(left, ""), word))
        else:
            rest.append(word)
    return [*given, *rest]


def twins(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns two of the names that a file system which ignores case takes for one, None where there are none."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.lower(), name)) != name:
            return min(other, name), max(other, name)
    return None
