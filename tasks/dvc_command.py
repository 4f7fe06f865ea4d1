"""`dvc repro` without its advice: `python -P tasks/dvc_command.py repro ...`.

DVC lists every file that no remote has, though it then computes it, and ends with what to type next. What a person
must know comes through: which stage runs or is restored, every other warning, every error.

Written for DVC 3.67, whose logging and whose console have no settings for this. Without `-P` Python would take the
folder of this file for where `dvc` is to be found.
"""

from __future__ import annotations

import logging
import sys

ADVICE = ("Some of the cache files do not exist neither locally nor on remote.", "%s is frozen.")  # among warnings
TOLD = ("Running stage '%s':", "Stage '%s' is cached")  # among the rest
PULLING, NOT_PULLED = "Pulling data for %s", ("Unable to pull data for %s", "Running stage '%s':")


class Told:
    """Whether a person is to see what DVC logs."""

    def __init__(self) -> None:
        self.pulled: str | None = None  # the stage whose outputs came from a remote, which DVC says only beforehand

    def __call__(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        if message == PULLING and isinstance(record.args, tuple):
            self.pulled = str(getattr(record.args[0], "addressing", record.args[0]))
        elif message in NOT_PULLED:
            self.pulled = None
        return not message.startswith(ADVICE) if record.levelno >= logging.WARNING else message.startswith(TOLD)


def main(arguments: list[str]) -> int:
    """Returns DVC's status."""
    from dvc import cli
    from dvc.ui import ui

    told = Told()
    for name in ("dvc", "dvc_objects", "dvc_data"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(told)
    ui.enable = lambda: None  # else "Use `dvc push` to send your updates"; its errors are written all the same
    status = int(cli.main(arguments))
    if status == 0 and told.pulled:
        print(f"Stage '{told.pulled}' is restored from the remote")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
