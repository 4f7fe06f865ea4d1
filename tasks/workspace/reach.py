"""Asking DVC's default remote whether it answers: `python -P tasks/workspace/reach.py` ends with 0 if it does.

A pull begins with the same question, but DVC asks it for minutes, once for each stage.
"""

from __future__ import annotations

import sys

from lcmlora.io import faults
from lcmlora.io.terminal import note
from lcmlora.tasks import dvc_internals


def main() -> int:
    """Returns the exit status. The reason for another one than 0 is the line on standard error."""
    try:
        dvc_internals.ask_default_remote()
    except Exception as error:  # of any of the libraries that DVC reaches remotes with
        note(faults.chain(error), "error: ")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
