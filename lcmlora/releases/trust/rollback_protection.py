"""What this user has seen in stores that are checked by publish.verify_key: each channel's newest pointer, each yank.

A signature says who wrote a record, and never that there is no newer one: whoever can write to a store can put an older
pointer back, or delete a yank. So the newest that was seen is kept here, and going back behind it is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.files import write_json
from lcmlora.io.parsing import as_object, read_json
from lcmlora.releases.trust.records import Pointer, moment

STATE = "LCMLORA_STATE"  # environment: where this is kept


def pass_pointer(found: Pointer, store: str, channel: str, settings: Publish, place: str) -> None:
    """Notes a signed pointer as the newest that was seen. Raises UserError where a newer one was."""
    assert found.time is not None
    about = {"channel": channel, "model": found.model} | _store(store, settings)
    with _note(about) as (path, note):
        if note is not None:
            newest = moment(note.get("time"), str(path))
            if newest > found.time or (newest == found.time and note.get("sha256") != found.sha256):
                raise UserError(
                    f"{place}: is of {found.time.isoformat()} and names {found.sha256[:12]}..., and one of "
                    f"{newest.isoformat()} that names {terminal.shown(note.get('sha256'))[:12]}... was seen "
                    "here before; an older one was put back: do not use it. To go back on purpose run "
                    f"`lcmlora registry rollback`, which writes a new pointer; if the store itself was reset, delete "
                    f"{path}"
                )
            if newest == found.time:
                return
        _write(path, about | {"time": found.time.isoformat(), "sha256": found.sha256})


def newest_pointer(model: str, channel: str, store: str, settings: Publish) -> datetime | None:
    """Returns the time of the newest pointer that was seen, None where none was."""
    about = {"channel": channel, "model": model} | _store(store, settings)
    with _note(about) as (path, note):
        return None if note is None else moment(note.get("time"), str(path))


def pass_yank(
    found: dict[str, str] | None, store: str, model: str, sha256: str, settings: Publish
) -> dict[str, str] | None:
    """Returns the yank of a release: the record that was found, which is noted, or one that was seen here before.

    Args:
        found: a signed record.
    """
    about = {"model": model, "release": sha256} | _store(store, settings)
    with _note(about) as (path, note):
        if found is not None:
            if note is None:
                _write(path, about | {key: found[key] for key in ("reason", "who", "time")})
            return found
        if note is None:
            return None
        known = {key: terminal.shown(note.get(key)) for key in ("reason", "who", "time")}
        gone = f"the record has gone from the store; {path} remembers it"
        return known | {"reason": f"{known['reason']} ({gone})"}


def _store(uri: str, settings: Publish) -> dict[str, str]:
    # Two servers may have a bucket of the same name.
    return {"store": uri, "endpoint": settings.endpoint_url or "" if uri.startswith("s3://") else ""}


@contextlib.contextmanager
def _note(about: dict[str, str]) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Yields where a note is kept and what it says, None where there is none. One process at a time."""
    try:
        folder = _folder()
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        path = folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("ab")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        print(
            f"warning: {STATE}: what was seen in {about['store']} cannot be kept ({reason}), so an older pointer or a "
            "yank that was deleted is not noticed; set it to a folder that lasts",
            file=sys.stderr,
        )
        yield Path(os.devnull), None
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            note = as_object(read_json(path), str(path)) if path.exists() else None
        except UserError as error:
            raise UserError(f"{error}; it is written by lcmlora: delete it if you trust {about['store']}") from None
        yield path, note


def _write(path: Path, note: dict[str, str]) -> None:
    if path != Path(os.devnull):
        try:
            write_json(path, note)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _folder() -> Path:
    if named := os.environ.get(STATE):
        return Path(named, "seen")
    if state := os.environ.get("XDG_STATE_HOME"):
        return Path(state, "lcmlora", "seen")
    return Path("~/.local/state/lcmlora/seen").expanduser()
