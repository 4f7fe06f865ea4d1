"""Runs a command, and ends it with all its children when the flow that started it dies.

    python tasks/supervisor.py COMMAND ...            runs the command, and ends with its status
    python tasks/supervisor.py --marked NAME=VALUE    waits for the end of standard input, then ends all processes that
                                                      have this variable in their environment

The flow holds the other end of standard input, which ends however the flow dies. Then the command and its children get
SIGTERM, and after some seconds SIGKILL. Children that outlive their command are ended, too: DVC may end without its
trainer. This file uses only the standard library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

GRACE = 5.0  # seconds between asking a process to end and killing it
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_LINUX = sys.platform == "linux"


def main(arguments: list[str]) -> int:
    """Returns the command's status, 128 + N if signal N ended it, 143 if the flow that holds standard input ended."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(each, _nothing)  # a handler, since the command would inherit that a signal is ignored
    if arguments[:1] == ["--marked"]:
        while os.read(0, 1):
            pass
        _end(lambda: _marked(arguments[1]))
        return 0
    if _LINUX:
        # Processes whose parent has ended become children of this one, even in sessions of their own.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"error: {arguments[0]}: {error.strerror}", file=sys.stderr)
        return 127
    status = _wait(command, woken)
    _end(_family)
    return status


def _nothing(number: int, frame: object) -> None:
    """Handles a signal to the whole group: this process goes on, so that it can end the others."""


def _wait(command: subprocess.Popen[bytes], woken: int) -> int:
    while (status := command.poll()) is None:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 12)
        if 0 in ready and not os.read(0, 1):
            return 128 + signal.SIGTERM
    return 128 - status if status < 0 else status


def _end(find: Callable[[], list[int]]) -> None:
    """Ends all processes that `find` returns, in their order, and returns when there are none any more."""
    terminated: set[int] = set()
    until = time.monotonic() + GRACE
    while found := find():
        late = time.monotonic() > until
        for pid in found:
            if late or pid not in terminated:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        terminated |= set(found)
        time.sleep(0.02)


def _family() -> list[int]:
    """Returns the descendants of this process, and the processes in the group that it leads, parents first.

    A shell that outlives its command says on the terminal how that ended.
    """
    _reap()
    own, table = os.getpid(), _processes()
    starts = [own, *(pid for pid, (_, group) in table.items() if group == own)]
    family = dict.fromkeys(pid for start in starts for pid in (start, *_descendants(start, table)))
    return [pid for pid in family if pid != own]


def _descendants(pid: int, table: dict[int, tuple[int, int]]) -> list[int]:
    """Returns the children of a process, then their children, and so on."""
    found: dict[int, None] = {}
    newest = {pid}
    while newest := {child for child, (parent, _) in table.items() if parent in newest} - found.keys() - {pid}:
        found |= dict.fromkeys(newest)
    return list(found)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _processes() -> dict[int, tuple[int, int]]:
    """Returns the parent and the group of every living process."""
    if not _LINUX:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        return {int(pid): (int(parent), int(group)) for pid, parent, group, state in rows if state[0] != "Z"}
    found = {}
    for pid, text in _read_all("stat"):
        state, parent, group = text.rpartition(b")")[2].split()[:3]  # after the name, which may contain anything
        if state not in (b"Z", b"X"):
            found[pid] = (int(parent), int(group))
    return found


def _marked(variable: str) -> list[int]:
    """Returns the processes that have this variable in their environment; none on other systems than Linux."""
    living = _processes()
    entry = variable.encode()
    found = {pid for pid, text in _read_all("environ") if entry in text.split(b"\0")} if _LINUX else set()
    return sorted(found & living.keys() - {os.getpid()})


def _read_all(name: str) -> list[tuple[int, bytes]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found.append((int(folder.name), (folder / name).read_bytes()))
            except OSError:  # it has ended, or belongs to another user
                continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
