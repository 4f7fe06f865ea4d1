"""Finding and deleting what piles up in a project's folder: DVC's cache and remote, abandoned scratch folders, logs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.io.files import discard, locked
from lcmlora.project import Project
from lcmlora.settings.services import Retention
from lcmlora.tasks.dvc import StageFailed, is_cache_shared
from lcmlora.tasks.leftovers import repair
from lcmlora.tasks.processes import Processes, python, reason

_DAY = 86400.0  # seconds
_OWN_BUDGETS = ("teacher", "shards")  # folders of scratch/ that keep themselves below a size
_SCOPES = {"workspace": (), "branches": ("--all-branches", "--all-tags"), "commits": ("--all-commits",)}


class Busy(UserError):
    """A run is under way."""


@dataclass(frozen=True)
class Garbage:
    """Files that nothing needs any more.

    bytes: None where it is not known.
    """

    kind: str  # DVC's cache, DVC's remote, scratch or logs
    name: str
    bytes: int | None
    why: str


def dvc_garbage(settings: Retention, processes: Processes) -> list[Garbage]:
    """Returns what `dvc gc` would delete of cache and remote by these settings.

    Raises:
        StageFailed: DVC fails, or Git lacks the commits whose results are to be kept.
    """
    if not prunes_dvc(settings):
        return []
    cache = _unused(settings, processes, remote=False)
    far = _unused(settings, processes, remote=True) if settings.dvc_remote else []
    kinds = {"DVC's cache": cache, "DVC's remote": [path for path in far if path not in cache]}
    found = []
    for kind, paths in kinds.items():
        sizes = [Path(path).stat().st_size if Path(path).is_file() else None for path in paths]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        if paths:
            found.append(Garbage(kind, f"{len(paths)} objects", total, _why(settings)))
    return found


def prunes_dvc(settings: Retention) -> bool:
    """Returns whether DVC's cache is pruned: not where it lies outside the project, where others may use it.

    Raises:
        StageFailed: DVC's settings cannot be read.
    """
    return settings.dvc != "everything" and not is_cache_shared()


def _unused(settings: Retention, processes: Processes, *, remote: bool) -> list[str]:
    lines = _gc(settings, processes, remote=remote, dry=True)
    return [match[1] for line in lines if (match := re.fullmatch(r"Removing (.+)", line.strip()))]


def _why(settings: Retention) -> str:
    kept = {"commits": "no commit", "branches": "no branch and no tag", "workspace": "nothing"}[settings.dvc]
    return f"{kept} names them, and dvc.lock does not" if settings.dvc != "workspace" else "dvc.lock does not name them"


def delete_dvc_garbage(settings: Retention, processes: Processes) -> None:
    """Runs `dvc gc` by these settings. It may be killed at any moment: dvc.lock names nothing that it deletes.

    Raises:
        StageFailed: as for `dvc_garbage`.
    """
    if prunes_dvc(settings):
        _gc(settings, processes, remote=settings.dvc_remote, dry=False)


def _gc(settings: Retention, processes: Processes, *, remote: bool, dry: bool) -> list[str]:
    scope = _SCOPES[settings.dvc] if _has_git() else ()
    if scope and _git("rev-parse", "--is-shallow-repository") == "true":
        raise StageFailed(
            "dvc gc: this clone of Git is shallow, so nobody knows what the missing commits name; `git fetch "
            "--unshallow`, or set retention.dvc to workspace or everything"
        )
    options = ["--force", "--workspace", *scope, *(["--cloud"] if remote else []), *(["--dry"] if dry else [])]
    repair()
    command = python("dvc", "--wait-for-lock", "gc", *options)
    with processes.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    lines = (out + err).decode(errors="replace").splitlines()
    if process.returncode != 0:
        raise StageFailed(f"dvc gc: {reason(lines, process.returncode)}")
    return lines


def _has_git() -> bool:
    return _git("rev-parse", "--git-dir") is not None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def old_files(project: Project, settings: Retention, now: float | None = None) -> list[Garbage]:
    """Returns folders of scratch/ that nothing has touched for `scratch_days`, and logs of that age in .up/.

    Args:
        now: seconds since 1970; the present time by default.
    """
    before = (time.time() if now is None else now) - settings.scratch_days * _DAY
    why = f"not touched for {settings.scratch_days:g} days"
    found = []
    for folder in sorted(project.scratch().glob("*/*/")):
        if folder.parent.name not in _OWN_BUDGETS and not folder.is_symlink():
            newest, size = _state(folder)
            if newest < before:
                found.append(Garbage("scratch", str(folder), size, why))
    for log in sorted((project.root / ".up").glob("*.log.*")):  # those that are written to have no number
        if log.is_file() and log.stat().st_mtime < before:
            found.append(Garbage("logs", str(log), log.stat().st_size, why))
    return found


def _state(folder: Path) -> tuple[float, int]:
    """Returns the time of the newest change below a folder, and the bytes of its files."""
    newest, size = folder.stat().st_mtime, 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # its owner is at work
            state = path.lstat()
            newest, size = max(newest, state.st_mtime), size + (0 if path.is_dir() else state.st_size)
    return newest, size


def delete_old_file(garbage: Garbage) -> bool:
    """Deletes a folder of scratch/ or a log. Returns False where a process works in the folder, so that it stays."""
    path = Path(garbage.name)
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    try:
        with locked(path):
            discard(path)
    except UserError:  # held by the run that works there
        return False
    return True


@contextlib.contextmanager
def in_use() -> Iterator[None]:
    """Keeps `lcmlora prune` away from this project within the block. Waits while it is at work.

    Several runs may hold this at once. To be held by what reads or makes stages' results.
    """
    with _lock_file() as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # a prune takes seconds to minutes, and a signal interrupts this
        yield


@contextlib.contextmanager
def pruning() -> Iterator[None]:
    """Keeps runs of this project waiting within the block.

    Raises:
        Busy: a run is under way, or another prune.
    """
    with _lock_file() as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("a run is under way in this folder, or another prune; nothing was deleted") from None
        yield


@contextlib.contextmanager
def _lock_file() -> Iterator[int]:
    path = Path(".dvc/tmp/lcmlora-prune.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
