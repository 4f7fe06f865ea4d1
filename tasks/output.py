"""Showing a command's output in Prefect: its lines in the run's log, its progress as an artifact."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.runtime import deployment

from lcmlora import masking, progress
from lcmlora.io.terminal import LINE, markdown, note, shown
from lcmlora.tasks.outages.connection import leave_to_run

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_REMIND = 1800.0  # seconds between two lines about the same wait
_EVERY = 5.0  # seconds between two updates of an artifact
_LATE = 30.0  # seconds for the last update once the server is back; it is tried about every five

_LEVELS = {"error: ": logging.ERROR, "ERROR: ": logging.ERROR, "warning: ": logging.WARNING}


def run_logger() -> Any | None:
    """Returns the logger of the present Prefect run, None outside a run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return None


def log_line(line: str) -> None:
    """Writes a line to the log of the present Prefect run, and unless a worker has started it to standard error."""
    line = masking.text(line)
    logger = run_logger()
    if logger is not None:
        level = next((level for start, level in _LEVELS.items() if line.startswith(start)), logging.INFO)
        logger.log(level, "%s", shown(line, LINE))
    if logger is None or deployment.id is None:
        note(line)


class Waiting:
    """Tells what is waited for: at once, when it changes, and every half hour, since a silent run looks stuck."""

    def __init__(self) -> None:
        self._told: tuple[object, float] | None = None

    def tell(self, what: object, line: Callable[[], str]) -> None:
        """Writes the line if it is due. To be called again and again.

        Args:
            what: is waited for.
            line: makes the line.
        """
        now = time.monotonic()
        if self._told is None or what != self._told[0] or now - self._told[1] > _REMIND:
            self._told = (what, now)
            log_line(line())


@contextlib.contextmanager
def line_listener(stage: str, model: str | None = None) -> Iterator[Callable[[str], None] | None]:
    """Yields a function that takes a command's lines to the present Prefect run; None outside a run.

    The log's entries have the fields `stage` and `model`. Progress goes to the artifact `progress-STAGE`, which its own
    thread updates every five seconds at most, so that a slow server does not slow the training down.
    """
    logger = run_logger()
    if logger is None:
        yield None
        return
    fields = {"stage": stage, "model": model}
    with _ProgressArtifact(f"progress-{slug(stage)}", logger) as artifact:

        def listen(line: str) -> None:
            level = next((level for start, level in _LEVELS.items() if line.startswith(start)), logging.INFO)
            logger.log(level, "%s", shown(masking.text(line), LINE), extra=fields)
            if step := progress.parse_log_line(line):
                artifact.put(*step)

        yield listen


def slug(name: str) -> str:
    """Returns the name in the form of Prefect's keys: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class _ProgressArtifact:
    """A progress artifact that shows the last figures it was given."""

    def __init__(self, key: str, logger: Any) -> None:
        self._key = key
        self._logger = logger
        self._waiting: tuple[str, int, int] | None = None
        self._artifact: UUID | None = None
        self._changed, self._over = threading.Event(), threading.Event()
        # The artifact belongs to the run of the thread that makes this object.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._follow,), daemon=True)

    def __enter__(self) -> _ProgressArtifact:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._changed.set()
        self._thread.join(_EVERY)
        if self._thread.is_alive():  # the server is away
            leave_to_run(self._wait)

    def _wait(self, client: SyncPrefectClient) -> None:
        """Waits until the last figures are shown, which the thread tries again and again."""
        client.hello()
        self._thread.join(_LATE)

    def put(self, label: str, done: int, total: int) -> None:
        self._waiting = (label, done, total)
        self._changed.set()

    def _follow(self) -> None:
        try:
            while not self._over.is_set():
                self._changed.wait()
                self._changed.clear()
                waiting, self._waiting = self._waiting, None
                if waiting:
                    self._show(*waiting)
                self._over.wait(_EVERY)
            if self._waiting:
                self._show(*self._waiting)
        except Exception as error:  # failing to show progress must not end the work
            self._logger.warning("no progress is shown any more: %s", masking.text(error))

    def _show(self, label: str, done: int, total: int) -> None:
        share, text = 100 * done / max(total, 1), markdown(f"{label}: {done} of {total}")
        if self._artifact is None:
            self._artifact = cast(UUID, create_progress_artifact(share, key=self._key, description=text))
        else:
            update_progress_artifact(self._artifact, share, description=text)
