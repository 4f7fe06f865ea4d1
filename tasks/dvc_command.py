"""Running `dvc repro` without its advice: `python -P tasks/dvc_command.py repro ...`.

DVC lists every file that no remote has, although it then computes it, and ends with advice on what to type next. This
command leaves both out. It shows which stage runs or is restored, all other warnings, and all errors.

It is written for DVC 3.67, which has no settings for this. Without `-P`, Python would import `dvc` from the folder of
this file.
"""

from __future__ import annotations

import logging
import sys

ADVICE = ("Some of the cache files do not exist neither locally nor on remote.", "%s is frozen.")  # hidden warnings
SHOWN = ("Running stage '%s':", "Stage '%s' is cached")  # messages below warnings that are shown
PULLING, NOT_PULLED = "Pulling data for %s", ("Unable to pull data for %s", "Running stage '%s':")


class MessageFilter:
    """A filter of logging that lets the messages pass that a person should see."""

    def __init__(self) -> None:
        self.pulled: str | None = None  # the stage whose outputs are pulled; DVC logs only the beginning of it

    def __call__(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        if message == PULLING and isinstance(record.args, tuple):
            self.pulled = str(getattr(record.args[0], "addressing", record.args[0]))
        elif message in NOT_PULLED:
            self.pulled = None
        return not message.startswith(ADVICE) if record.levelno >= logging.WARNING else message.startswith(SHOWN)


def main(arguments: list[str]) -> int:
    """Runs DVC and returns its exit status."""
    from dvc import cli
    from dvc.ui import ui

    shown = MessageFilter()
    for name in ("dvc", "dvc_objects", "dvc_data"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(shown)
    ui.enable = lambda: None  # hides "Use `dvc push` to send your updates"; errors are shown all the same
    status = int(cli.main(arguments))
    if status == 0 and shown.pulled:
        print(f"Stage '{shown.pulled}' is restored from the remote")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
