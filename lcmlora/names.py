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
    """Returns what is wrong with a name; None if nothing is.

    A name is part of a path, a word of a command and a word of a page, and means nothing else in any of them.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"is no name: expected {RULE}"
    if _DEVICE.fullmatch(name):
        return "is no name: Windows has a device that is called so"
    return None


def check(name: str, what: str) -> str:
    """Returns the name. Raises UserError, whose message begins with `what`, if it is no name."""
    if wrong := fault(name):
        raise UserError(f"{what}: {shown(repr(name), 80)} {wrong}")
    return name


def positional_arguments(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line, with the arguments NAME in place of `--model NAME` and `--name NAME`.

    DVC quotes the options that it writes for `${item}` in dvc.yaml, but not the names that dvc.yaml writes out.

    Raises:
        UserError: such an option has no name after it.
    """
    names, others, remaining = [], [], iter(words)
    for word in remaining:
        if word in ("--model", "--name"):
            names.append(check(next(remaining, ""), word))
        else:
            others.append(word)
    return [*names, *others]


def clashing(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns two names that are one on a file system which ignores case; None if there are none."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.lower(), name)) != name:
            return min(other, name), max(other, name)
    return None
