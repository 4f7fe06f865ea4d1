"""The exceptions of this package that are meant for the person who runs it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lcmlora.io.terminal import note


class UserError(Exception):
    """Something a person can put right: one line that names the thing, what was expected and what to do.

    The command line prints the line without a traceback and exits with status 2. Passwords and tokens in it are masked,
    whoever shows or stores it.
    """

    def __str__(self) -> str:
        from lcmlora.io import masking

        return masking.text(super().__str__())


class Unavailable(UserError):
    """Something outside could not be reached or did not answer; the same call may succeed later."""


@contextmanager
def reporting(prefix: str = "", verb: str = "") -> Iterator[None]:
    """A UserError in the block is printed as it is, each line after `prefix`, and ends the process with status 2.

    So is, in one line, what the machine refuses: a full disk, a place that cannot be written, too little memory.

    Args:
        verb: of the command line, which decides what takes less memory.
    """
    from lcmlora.io import faults, masking

    try:
        yield
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else faults.told(error, verb)
        if line is None:
            print(masking.text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
            raise SystemExit(1) from None
        note(masking.text(line), f"error: {prefix}")
        raise SystemExit(2) from None
