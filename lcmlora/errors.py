"""The exceptions of this package that are meant for the person who runs it."""

from __future__ import annotations

from lcmlora import masking


class UserError(Exception):
    """An error that a person can correct: one line that names the thing, what was expected and what to do.

    The command line prints the line without a traceback and exits with status 2. Passwords and tokens in it are masked
    wherever it is shown or stored.
    """

    def __str__(self) -> str:
        return masking.text(super().__str__())


class Unavailable(UserError):
    """Something outside could not be reached or did not answer; the same call may succeed later."""


class NotFound(UserError):
    """A name means nothing where it was looked up, so that another place may be asked; nothing there is wrong."""
