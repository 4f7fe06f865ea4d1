"""The one exception of this package that is meant for the person who runs it."""


class UserError(Exception):
    """Something a person can put right: one line that names the thing, what was expected and what to do.

    The command line prints the line without a traceback and exits with status 2.
    """
