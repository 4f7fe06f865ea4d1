"""How long each stage took the last time that it ran on this machine: `timings/stages.json`, which Git does not have.

`lcmlora upgrade` says by it what the stages cost that become stale.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from pydantic import Field

from lcmlora.errors import UserError
from lcmlora.io import temporaries
from lcmlora.io.documents import Document, Number
from lcmlora.io.files import make_folder
from lcmlora.io.terminal import note
from lcmlora.project import Project


class Durations(Document):
    """Seconds by the stages' entries in resolved.yaml, such as models.emoji.distill."""

    seconds: dict[str, Number] = Field(default_factory=dict)  # of the last run that ended well, with its former parts
    unfinished: dict[str, Number] = Field(default_factory=dict)  # of parts that ended in an error since then


def read(project: Project) -> Durations:
    """Returns the durations that this machine measured. Raises UserError if the file is damaged."""
    path = project.durations
    return Durations.read(path) if path.is_file() else Durations()


@contextlib.contextmanager
def measured(project: Project, entry: str) -> Iterator[None]:
    """Measures the block, and keeps its duration as that of this stage.

    A stage that ends in an error goes on from its last checkpoint the next time, so that the seconds of both count. Of
    several processes that train together the first one measures. A process that is killed leaves nothing.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    began = time.monotonic()
    try:
        yield
    except BaseException as error:
        # A launcher ends with the status of its processes.
        ended_well = isinstance(error, SystemExit) and error.code in (None, 0)
        with _reported():
            _keep(project, entry, time.monotonic() - began, ended_well)
        raise
    with _reported():
        _keep(project, entry, time.monotonic() - began, ended_well=True)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Reports what a measurement cannot be written for, since the stage's own result or error matters more."""
    try:
        yield
    except OSError as error:
        note(f"the duration of the stage is not kept: {error}", "warning: ")


def _keep(project: Project, entry: str, seconds: float, ended_well: bool) -> None:
    path = project.durations
    make_folder(path.parent)
    with temporaries.locked(path):
        try:
            former = read(project)
        except UserError as error:
            note(f"{error}; it is begun anew", "warning: ")
            former = Durations()
        whole, unfinished = dict(former.seconds), dict(former.unfinished)
        total = round(seconds + unfinished.pop(entry, 0.0), 1)
        (whole if ended_well else unfinished)[entry] = total
        Durations(seconds=whole, unfinished=unfinished).write(path)
