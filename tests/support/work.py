"""Work for workers, which must be importable there: what each task does stands in the task."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmlora.config import Launch
from lcmlora.errors import NotFound
from lcmlora.parallel.workers import workers


@dataclass(frozen=True)
class Make:
    """Makes the function of a worker, and leaves a line in the folder's file `made`."""

    folder: Path
    fails: bool = False

    def __call__(self) -> Callable[[str], tuple[int, str]]:
        self._log("made", "")
        if self.fails:
            raise NotFound("base: not found")
        return self._act

    def _act(self, task: str) -> tuple[int, str]:
        """Does what the first word of a task says, after it has left a line in the file `begun`."""
        self._log("begun", task)
        match task.split(":")[0]:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die once" if self._first(task):
                os.kill(os.getpid(), signal.SIGKILL)
            case "user error":
                raise NotFound(f"{task}: not found")
            case "error":
                raise ZeroDivisionError(task)
            case "function":
                return lambda: None  # type: ignore[return-value]
            case "slow":
                time.sleep(0.3)
            case "wait":
                time.sleep(600)
        self._log("done", task)
        return os.getpid(), task.upper()

    def _log(self, name: str, task: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(f"{os.getpid()} {task}\n")

    def _first(self, task: str) -> bool:
        return self.lines("begun").count(task) == 1

    def lines(self, name: str) -> list[str]:
        """Returns the tasks in a file of the folder."""
        path = self.folder / name
        return [line.partition(" ")[2] for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self) -> set[int]:
        """Returns the process ids of all workers that there were."""
        path = self.folder / "made"
        return {int(line.split()[0]) for line in path.read_text().splitlines()} if path.exists() else set()


def drive(launch: dict[str, Any] | None = None) -> None:
    """A driver whose workers do not end by themselves; the argument of its process is their folder."""
    with workers(Launch(**launch or {"processes": 2}), Make(Path(sys.argv[1]))) as pool:
        list(pool.results(["wait:1", "wait:2", "wait:3"]))
