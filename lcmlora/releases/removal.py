"""Deleting a published release, for `lcmlora prune`. A channel never points to a release that is gone.

The mark `pruned.json` comes first. While it is there, no channel is pointed to the release and nobody publishes it
again. Then the channels are read: a release that one of them names stays, and loses its mark. Then the manifest goes,
after which readers see no release, then the other files, and the mark last. If that is interrupted, the next call goes
on; the mark says that it must.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from lcmlora.config import Publish
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import terminal
from lcmlora.io.parsing import Malformed, as_object, parse_json
from lcmlora.releases import manifest
from lcmlora.releases.manifest import MANIFEST
from lcmlora.releases.stores.store import Entry, Store, open_store
from lcmlora.releases.trust import records

PRUNED = "pruned.json"
_RELEASE = re.compile(r"[^/]+/sha256-[0-9a-f]{12}")
_ROUNDS = 5  # of deleting what another process has just added


@dataclass(frozen=True)
class Stored:
    """A release in a store, and what names it there."""

    store: Store
    prefix: str  # MODEL/sha256-<12 digits>
    bytes: int
    files: int
    channels: tuple[str, ...]

    @property
    def uri(self) -> str:
        """The release's address."""
        return f"{self.store.uri}/{self.prefix}"


def find(settings: Publish, model: str) -> dict[str, Stored]:
    """Returns the releases of a model in a store by their prefixes, unfinished ones included.

    Raises:
        UserError: the store cannot be reached, or a channel's pointer cannot be read, so that nobody knows which
            release it names.
    """
    store = open_store(settings, consequence="nothing was deleted there")
    entries: dict[str, list[Entry]] = {}
    for entry in store.entries(f"{model}/sha256-"):
        prefix = entry.name.rpartition("/")[0]
        if _RELEASE.fullmatch(prefix):  # not so the object on which an S3 server is tried, MODEL/sha256-probe
            entries.setdefault(prefix, []).append(entry)
    channels = _channels(store, model)
    return {
        prefix: Stored(store, prefix, sum(each.bytes for each in found), len(found), tuple(channels.get(prefix, ())))
        for prefix, found in entries.items()
    }


def _channels(store: Store, model: str) -> dict[str, list[str]]:
    """Returns the channels by the prefix of the release that they point to, whoever moved them."""
    found: dict[str, list[str]] = {}
    for entry in store.entries(f"{model}/channels/"):
        match = re.fullmatch(r"[^/]+/channels/([^/]+)\.json", entry.name)
        content = store.read(entry.name) if match else None
        if match is None or content is None:
            continue
        place = f"{store.uri}/{entry.name}"
        try:
            pointer = records.pointer_of(records.read_record(records.POINTER, content[0], place), place)
        except UserError as error:
            raise UserError(f"{error}; as nobody knows what it points to, no release of {model} is deleted") from None
        found.setdefault(f"{model}/sha256-{pointer.sha256[:12]}", []).append(match[1])
    return found


def channels_of(store: Store, prefix: str) -> list[str]:
    """Returns the channels that point to a release now. Raises UserError as `find` does."""
    return _channels(store, prefix.partition("/")[0]).get(prefix, [])


def remove(store: Store, prefix: str, *, why: str) -> bool:
    """Deletes a release. Returns False where a channel names it, so that it stays.

    Args:
        prefix: MODEL/sha256-<12 digits>.
        why: for whoever finds the mark.

    Raises:
        UserError: the store cannot be reached or deletes nothing, or a publisher adds files all the time.
    """
    mark = f"{prefix}/{PRUNED}"
    if not store.entries(f"{prefix}/"):
        return True
    content = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "reason": why}).encode()
    store.create(mark, content, hashlib.sha256(content).hexdigest())
    if channels_of(store, prefix):
        # One whose manifest is gone cannot be completed here: the mark stays, and says so to whoever looks.
        if store.read(f"{prefix}/{MANIFEST}") is not None:
            store.delete(mark)
        return False
    for _ in range(_ROUNDS):
        names = [entry.name for entry in store.entries(f"{prefix}/") if entry.name != mark]
        if not names:
            store.delete(mark)
            return True
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")):
            store.delete(name)
    raise UserError(f"{store.uri}/{prefix}: somebody adds files to it while it is deleted; run `lcmlora prune` again")


def refuse_pruned(store: Store, prefix: str) -> None:
    """Raises Unavailable where the release is being deleted: publishing it may succeed afterwards."""
    content = store.read(f"{prefix}/{PRUNED}")
    if content is None:
        return
    place = f"{store.uri}/{prefix}"
    try:
        time = terminal.shown(as_object(parse_json(content[0]), place).get("time"))
    except Malformed:
        time = "an unknown time"
    raise Unavailable(
        f"{place}: is being deleted by `lcmlora prune` since {time}; run again when that has ended, and if it was "
        "interrupted, run `lcmlora prune` again"
    )


def sizes(store: Store, prefix: str) -> dict[str, int]:
    """Returns the bytes of a release's files by name, without those that a store adds."""
    return {entry.name.rpartition("/")[2]: entry.bytes for entry in store.entries(f"{prefix}/")}


def release_of(uri: str) -> tuple[str, str] | None:
    """Returns the address of the store and MODEL/sha256-<12 digits> of a release's address; None for any other."""
    root, prefix = manifest.split_address(uri)
    return (root, prefix) if root and _RELEASE.fullmatch(prefix) else None
