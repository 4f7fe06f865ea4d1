"""Runs a command and lets nothing of it outlive whoever holds the other end of standard input.

    python tasks/supervisor.py COMMAND ...            runs it, and ends with its status
    python tasks/supervisor.py --marked NAME=VALUE    ends what has this in its environment, once nobody holds the end

When standard input ends, as it does however its holder dies, the command and all that came of it is asked to end and
then killed. The same is done to what a command leaves behind: DVC ends or is killed without its trainer. Only the
standard library, so that it starts at once.
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
    """Returns the command's status, 128 + N where signal N ended it, 143 where the holder of standard input went."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(each, _nothing)  # what is ignored stays ignored in the command; a handler does not
    if arguments[:1] == ["--marked"]:
        while os.read(0, 1):
            pass
        _end(lambda: _marked(arguments[1]))
        return 0
    if _LINUX:
        # Those whose parent ends become children of this process and not of init, even in sessions of their own.
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
    """A signal to the whole group; only this process is left to see to the others."""


def _wait(command: subprocess.Popen[bytes], woken: int) -> int:
    while (status := command.poll()) is None:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 12)
        if 0 in ready and not os.read(0, 1):
            return 128 + signal.SIGTERM
    return 128 - status if status < 0 else status


def _end(find: Callable[[], set[int]]) -> None:
    """Returns when `find` finds no process any more."""
    asked: set[int] = set()
    until = time.monotonic() + GRACE
    while found := find():
        late = time.monotonic() > until
        for pid in found if late else found - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked |= found
        time.sleep(0.02)


def _family() -> set[int]:
    """Returns who descends from this process or is in the group that it leads."""
    _reap()
    own, table = os.getpid(), _processes()
    found = {own} | {pid for pid, (_, group) in table.items() if group == own}
    while children := {pid for pid, (parent, _) in table.items() if parent in found} - found:
        found |= children
    return found - {own}


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _processes() -> dict[int, tuple[int, int]]:
    """Returns parent and group of every process that has not ended."""
    if not _LINUX:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True).stdout
        rows = [line.split() for line in listed.splitlines()]
        return {int(pid): (int(parent), int(group)) for pid, parent, group, state in rows if state[0] != "Z"}
    found = {}
    for pid, text in _read_all("stat"):
        state, parent, group = text.rpartition(b")")[2].split()[:3]  # the name before it may hold anything
        if state not in (b"Z", b"X"):
            found[pid] = (int(parent), int(group))
    return found


def _marked(variable: str) -> set[int]:
    """Returns who was started with this variable; nobody but on Linux, where others' environments can be read."""
    living = _processes()
    wanted = variable.encode()
    found = {pid for pid, text in _read_all("environ") if wanted in text.split(b"\0")} if _LINUX else set()
    return found & living.keys() - {os.getpid()}


def _read_all(name: str) -> list[tuple[int, bytes]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found.append((int(folder.name), (folder / name).read_bytes()))
            except OSError:  # ended meanwhile, or another user's
                continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
