"""The exceptions of this package that are meant for the person who runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something a person can put right: one line that names the thing, what was expected and what to do.

    The command line prints the line without a traceback and exits with status 2.
    """


class Unavailable(UserError):
    """Something outside could not be reached or did not answer; the same call may succeed later."""


@contextmanager
def reporting(prefix: str = "") -> Iterator[None]:
    """A UserError in the block is printed as it is, each line after `prefix`, and ends the process with status 2."""
    try:
        yield
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {prefix}{line}", file=sys.stderr)
        raise SystemExit(2) from None
