"""How an error ends a command: one line for a mistake that a person can correct, a traceback for anything else."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lcmlora import extras, masking
from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.io.terminal import note


@contextmanager
def reporting_errors(prefix: str = "", verb: str = "") -> Iterator[None]:
    """Prints a UserError that is raised in the block, each line after `prefix`, and ends the process with status 2.

    A missing package of an extra is one line, too. So is an error of the machine, such as a full disk, a read-only
    folder or too little memory. Any other error is printed with its traceback and ends the process with status 1.

    Args:
        verb: of the command line, on which the advice against too little memory depends.
    """
    try:
        yield
    except Exception as error:
        missing = extras.missing(error)
        line = str(missing or error) if missing or isinstance(error, UserError) else faults.explain(error, verb)
        if line is None:
            print(masking.text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
            raise SystemExit(1) from None
        note(masking.text(line), f"error: {prefix}")
        raise SystemExit(2) from None
