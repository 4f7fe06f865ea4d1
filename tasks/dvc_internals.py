"""Undocumented parts of DVC that lcmlora relies on. tests/test_internals.py tests each of them."""

from __future__ import annotations

from pathlib import Path

import yaml

VERSION = "3.67"  # that this was written against

TEMPORARY = Path(".dvc/tmp")
LOCK = TEMPORARY / "lock"  # held with flock by a command that changes the repository
READERS_AND_WRITERS = TEMPORARY / "rwlock"  # {"write": {path: {"pid", "cmd"}}, "read": {path: [{"pid", "cmd"}]}}
READERS_AND_WRITERS_LOCK = TEMPORARY / "rwlock.lock"  # held while that table is rewritten


def is_lock_file(content: bytes) -> bool:
    """Returns whether DVC can read this as dvc.lock, by DVC's own schema."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError, Invalid):
        return False
    return True


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
