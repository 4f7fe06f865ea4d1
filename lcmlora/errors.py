"""The exceptions of this package that are meant for the person who runs it."""


class UserError(Exception):
    """Something a person can put right: one line that names the thing, what was expected and what to do.

    The command line prints the line without a traceback and exits with status 2.
    """


class Unavailable(UserError):
    """Something outside could not be reached or did not answer; the same call may succeed later."""
