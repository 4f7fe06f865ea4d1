"""Undocumented parts of DVC that lcmlora relies on. tests/test_internals.py tests each of them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

VERSION = "3.67"  # that this was written against

TEMPORARY = Path(".dvc/tmp")
LOCK = TEMPORARY / "lock"  # held with flock by a command that changes the repository
READERS_AND_WRITERS = TEMPORARY / "rwlock"  # {"write": {path: {"pid", "cmd"}}, "read": {path: [{"pid", "cmd"}]}}
READERS_AND_WRITERS_LOCK = TEMPORARY / "rwlock.lock"  # held while that table is rewritten

_REMIND = 1800.0  # seconds between two lines about the same wait
_PATIENCE = 3.0  # seconds that are waited for DVC's lock before anything is said


def is_lock_file(content: bytes) -> bool:
    """Returns whether DVC can read this as dvc.lock, by DVC's own schema."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError, Invalid):
        return False
    return True


def cache_folder() -> Path:
    """Returns the folder of DVC's cache of the repository in the current folder.

    Raises:
        ValueError: DVC's settings cannot be read.
    """
    from dvc.config import Config, ConfigError

    try:
        found = Config.from_cwd()["cache"].get("dir")
    except ConfigError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return Path(found) if found else Path(".dvc/cache")


def default_remote() -> str | None:
    """Returns the address of the default remote of the repository in the current folder, None where there is none.

    It is read in this process, since the `dvc` command takes a second to start.

    Raises:
        ValueError: DVC's settings cannot be read.
    """
    from dvc.config import Config, ConfigError

    try:
        settings = Config.from_cwd()
    except ConfigError as error:
        raise ValueError(" ".join(str(error).split())) from error
    remote = settings["remote"].get(settings["core"].get("remote"))
    return str(remote["url"]) if remote else None


def is_run_message(line: str, stage: str) -> bool:
    """Returns whether a line of `dvc repro` says that it runs this stage, instead of skipping or restoring it."""
    return line.startswith(f"Running stage '{stage}'")


@contextlib.contextmanager
def without_locks() -> Iterator[Any]:
    """Yields the `dvc.repo.Repo` of the current folder, which may be read beside any other DVC. Not for writing.

    It takes none of DVC's locks, so that it neither waits for a running DVC nor makes one fail: a `dvc repro` by hand
    whose stage ends while another command holds the lock loses the stage's results.
    """
    from dvc import rwlock
    from dvc.lock import LockNoop
    from dvc.repo import Repo

    former = rwlock.rwlock
    rwlock.rwlock = lambda *_: contextlib.nullcontext()
    try:
        with Repo() as repo:
            repo.lock = LockNoop()
            repo.lock.lock()
            yield repo
    finally:
        rwlock.rwlock = former


def ask_default_remote() -> None:
    """Asks the default remote for the folder of former runs, as a pull begins. Raises what DVC's file systems raise."""
    with without_locks() as repo:
        store = repo.cloud.get_remote_odb(None, hash_name="md5-dos2unix")
        store.fs.exists(store.fs.join(store.path, "runs"))


def say_what_the_lock_is_waited_for(holder: Callable[[Path], int | None], say: Callable[[int | None], None]) -> None:
    """Makes a DVC that waits for the repository's lock say for whom; by itself it shows a progress bar or nothing.

    Args:
        holder: returns the process that holds the lock on a file, None if there is none.
        say: is called with that process when the wait has taken some seconds, again every half hour, and with
            None when it is over.
    """
    from dvc import lock

    class Lock(lock.Lock):
        def lock(self) -> None:
            self._friendly = False
            until, said = time.monotonic() + _PATIENCE, False
            while self._wait and (pid := holder(Path(self.lockfile))) is not None:
                if time.monotonic() > until:
                    say(pid)
                    until, said = time.monotonic() + _REMIND, True
                time.sleep(_PATIENCE / 10)
            super().lock()
            if said:
                say(None)

    lock.Lock = Lock


def blockers(error: BaseException | None) -> list[int] | None:
    """Returns the processes that work on paths which a command needs; None if that is not why it failed.

    The list is empty if DVC's table of readers and writers itself was held too long.
    """
    from dvc.lock import LockError

    while error is not None:
        if isinstance(error, LockError):
            return [int(pid) for pid in re.findall(r"^  \(PID (\d+)\): ", str(error), re.MULTILINE)]
        error = error.__cause__ or error.__context__
    return None
