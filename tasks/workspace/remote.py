"""DVC's default remote: results of former runs are taken from it and sent to it, and no computing waits for it long."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence

from lcmlora import masking
from lcmlora.io.terminal import LINE, shown
from lcmlora.tasks import dvc_command
from lcmlora.tasks.dvc_internals import is_run_message
from lcmlora.tasks.output import log_line
from lcmlora.tasks.processes import Processes, reason, script, stream
from lcmlora.tasks.workspace import reach

_ANSWER = 60.0  # seconds in which a remote must answer


class Remote:
    """The remote during one run. From its first fault on, nothing more is taken from it in this run.

    Args:
        address: for messages.
    """

    def __init__(self, address: str) -> None:
        self.address = masking.address(address)
        self.fault: str | None = None
        self._asked = False
        self._asking, self._telling = threading.Lock(), threading.Lock()

    def answers(self, processes: Processes) -> bool:
        """Returns whether results can be taken from it. It is asked once."""
        with self._asking:
            if not self._asked and self.fault is None:
                if wrong := ask(processes):
                    self.give_up(wrong)
                self._asked = True
        return self.fault is None

    def give_up(self, fault: str) -> None:
        """Keeps why nothing more is taken from it, and says so the first time."""
        with self._telling:
            if self.fault is not None:
                return
            self.fault = fault
        log_line(
            f"warning: DVC's remote {self.address}: {fault}; this run computes what it would take from there, and at "
            "its end tries to send its results"
        )


class Pull:
    """How far `dvc repro --pull` of a stage has come, by its lines: it must begin within a time."""

    def __init__(self, stage: str, minutes: float, remote: Remote) -> None:
        self.begun = False
        self._stage = stage
        self._remote = remote
        self._seconds = 60 * minutes
        self.start()

    def start(self) -> None:
        """Begins the time anew, as the command does that had to wait for another DVC."""
        self._until = time.monotonic() + self._seconds

    def listen(self, line: str) -> None:
        """Takes a line of the command."""
        if is_run_message(line, self._stage):
            self.begun = True
        elif line.startswith(dvc_command.WAITS):
            self._until = float("inf")  # not for the remote
        elif line.startswith(dvc_command.GOES_ON):
            self.start()

    @property
    def is_late(self) -> bool:
        """Whether it should be ended: it takes too long, or another stage has found the remote at fault."""
        return not self.begun and (self._remote.fault is not None or time.monotonic() > self._until)


def ask(processes: Processes) -> str | None:
    """Returns why the default remote does not answer; None if it does."""
    try:
        status, lines = stream(processes, script(reach.__file__), timeout=_ANSWER, show=False)
    except TimeoutError:
        return f"does not answer within {_ANSWER:.0f} seconds"
    return reason(lines, status) if status != 0 else None


def push_fault(lines: Sequence[str], status: int) -> str | None:
    """Returns why `dvc push` did not send everything, by its important lines; None if it did.

    DVC gives the reason of each file, then how many failed. A failed entry of the run-cache does not change its status.
    """
    failed = [line for line in lines if line.startswith("ERROR: failed to transfer")]
    if failed:
        why = re.sub(r"^ERROR: failed to transfer '.*?' - ", "", failed[0])
        more = f" (and {len(failed) - 1} more files)" if len(failed) > 1 else ""
        return shown(masking.text(why), LINE) + more
    return reason(lines, status) if status != 0 else None
