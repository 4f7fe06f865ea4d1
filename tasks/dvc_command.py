"""Running `dvc repro` without its advice: `python -P tasks/dvc_command.py repro ...`.

DVC lists every file that no remote has, although it then computes it, and ends with advice on what to type next. This
command leaves both out. It shows which stage runs or is restored, all other warnings, and all errors. If it waits for
DVC's lock, it says for whom. If another process works on the same paths, it ends with the status BUSY, and its last
line says which: DVC cannot wait for that itself (treeverse/dvc#11054).

It is written for DVC 3.67, which has no settings for this. Without `-P`, Python would import `dvc` from the folder of
this file.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence

from lcmlora.tasks import dvc_internals
from lcmlora.tasks.workspace import activity

BUSY = 75  # EX_TEMPFAIL of sysexits.h
ADVICE = ("Some of the cache files do not exist neither locally nor on remote.", "%s is frozen.")  # hidden warnings
SHOWN = ("Running stage '%s':", "Stage '%s' is cached")  # messages below warnings that are shown
_BLOCKED = "blocked by processes "  # the last line of a command that ends as BUSY
WAITS, GOES_ON = "waiting for DVC's lock", "DVC's lock is free"  # the beginnings of two lines
PULLING, NOT_PULLED = "Pulling data for %s", ("Unable to pull data for %s", "Running stage '%s':")


class MessageFilter:
    """A filter of logging that lets the messages pass that a person should see."""

    def __init__(self) -> None:
        self.pulled: str | None = None  # the stage whose outputs are pulled; DVC logs only the beginning of it
        self.blockers: list[int] | None = None  # the processes because of which the command failed

    def __call__(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        blockers = dvc_internals.blockers(record.exc_info[1]) if record.exc_info else None
        if blockers is not None:
            self.blockers = blockers
            return False
        if message == PULLING and isinstance(record.args, tuple):
            self.pulled = str(getattr(record.args[0], "addressing", record.args[0]))
        elif message in NOT_PULLED:
            self.pulled = None
        return not message.startswith(ADVICE) if record.levelno >= logging.WARNING else message.startswith(SHOWN)


def blockers(lines: Sequence[str]) -> list[int]:
    """Returns the processes that a command which ended as BUSY has named in its last line."""
    last = next((line for line in reversed(lines) if line.startswith(_BLOCKED)), "")
    return list(map(int, re.findall(r"\d+", last)))


def main(arguments: list[str]) -> int:
    """Runs DVC and returns its exit status, or BUSY."""
    from dvc import cli
    from dvc.ui import ui

    dvc_internals.say_what_the_lock_is_waited_for(activity.lock_holder, _say_whom)
    shown = MessageFilter()
    for name in ("dvc", "dvc_objects", "dvc_data"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(shown)
    ui.enable = lambda: None  # hides "Use `dvc push` to send your updates"; errors are shown all the same
    status = int(cli.main(arguments))
    if status != 0 and shown.blockers is not None:
        print(_BLOCKED + ", ".join(map(str, shown.blockers)), file=sys.stderr)
        return BUSY
    if status == 0 and shown.pulled:
        print(f"Stage '{shown.pulled}' is restored from the remote")
    return status


def _say_whom(pid: int | None) -> None:
    line = GOES_ON if pid is None else f"{WAITS}, which is held by {activity.describe(pid)}"
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
