"""Protection against replayed records: the newest pointer of each channel and each yank that this user has seen.

A signature proves who wrote a record. It does not prove that there is no newer one: whoever can write to a store can
put an older pointer back, or delete a yank. So this module keeps the newest signed record of each kind on this
machine, and refuses an older one. Only stores that publish.verify_key checks are watched.
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

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.files import write_json
from lcmlora.io.parsing import JsonObject, as_object, read_json
from lcmlora.releases.trust.records import Pointer, Yank, parse_time

STATE = "LCMLORA_STATE"  # environment variable: the folder in which the memory is kept


def accept_pointer(pointer: Pointer, store: str, channel: str, settings: Publish, place: str) -> None:
    """Remembers a signed pointer as the newest one. Raises UserError where a newer one was seen before.

    Args:
        store: the address of the store.
        place: of the pointer, for messages.
    """
    assert pointer.time is not None
    key = {"channel": channel, "model": pointer.model} | _store_key(store, settings)
    with _remembered(key) as (path, memory):
        if memory is not None:
            newest = parse_time(memory.get("time"), str(path))
            if newest > pointer.time or (newest == pointer.time and memory.get("sha256") != pointer.sha256):
                raise UserError(
                    f"{place}: is of {pointer.time.isoformat()} and names {pointer.sha256[:12]}..., and one of "
                    f"{newest.isoformat()} that names {terminal.shown(memory.get('sha256'))[:12]}... was seen "
                    "here before; an older one was put back: do not use it. To go back on purpose run "
                    f"`lcmlora registry rollback`, which writes a new pointer; if the store itself was reset, delete "
                    f"{path}"
                )
            if newest == pointer.time:
                return
        _write(path, key | {"time": pointer.time.isoformat(), "sha256": pointer.sha256})


def newest_pointer_time(model: str, channel: str, store: str, settings: Publish) -> datetime | None:
    """Returns the time of the newest pointer that was seen, None where none was."""
    key = {"channel": channel, "model": model} | _store_key(store, settings)
    with _remembered(key) as (path, memory):
        return None if memory is None else parse_time(memory.get("time"), str(path))


def accept_yank(yank: Yank | None, store: str, model: str, sha256: str, settings: Publish) -> Yank | None:
    """Returns the yank of a release: the signed one in the store, which is remembered, or one that was seen before.

    Args:
        yank: the signed record in the store, None where there is none.
    """
    key = {"model": model, "release": sha256} | _store_key(store, settings)
    with _remembered(key) as (path, memory):
        if yank is not None:
            if memory is None:
                _write(path, key | {"reason": yank.reason, "who": yank.who, "time": yank.time})
            return yank
        if memory is None:
            return None
        reason, who, time = (terminal.shown(memory.get(name)) for name in ("reason", "who", "time"))
        return Yank(f"{reason} (the record has gone from the store; {path} remembers it)", who, time)


def _store_key(uri: str, settings: Publish) -> dict[str, str]:
    # Two servers may have a bucket of the same name.
    return {"store": uri, "endpoint": settings.endpoint_url or "" if uri.startswith("s3://") else ""}


@contextlib.contextmanager
def _remembered(key: dict[str, str]) -> Iterator[tuple[Path, JsonObject | None]]:
    """Yields the file that remembers the record of this key, and its content, None where there is none.

    Only one process at a time is inside the block.
    """
    try:
        folder = _folder()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        path = folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("ab")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        print(
            f"warning: {STATE}: what was seen in {key['store']} cannot be kept ({reason}), so an older pointer or a "
            "yank that was deleted is not noticed; set it to a folder that lasts",
            file=sys.stderr,
        )
        yield Path(os.devnull), None
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            memory = as_object(read_json(path), str(path)) if path.exists() else None
        except UserError as error:
            raise UserError(f"{error}; it is written by lcmlora: delete it if you trust {key['store']}") from None
        yield path, memory


def _write(path: Path, memory: dict[str, str]) -> None:
    if path != Path(os.devnull):
        try:
            write_json(path, memory)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _folder() -> Path:
    if named := os.environ.get(STATE):
        return Path(named, "seen")
    if state := os.environ.get("XDG_STATE_HOME"):
        return Path(state, "lcmlora", "seen")
    return Path("~/.local/state/lcmlora/seen").expanduser()
