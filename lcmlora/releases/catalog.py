"""What is published: the list of all releases, and one of them examined object by object."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.releases import manifest
from lcmlora.releases.manifest import MANIFEST, YANKED
from lcmlora.releases.stores import Entry, Store, open_store
from lcmlora.releases.trust.signing import SIGNATURE

_MOST_LINES = 20  # of what is wrong with a release


@dataclass(frozen=True)
class Published:
    """A release in a store, or what a publisher that has not ended left of one."""

    model: str
    sha256: str  # of the adapter; where there is no manifest only its first 12 digits are known
    uri: str
    bytes: int
    files: int
    time: str  # when it became whole, else of its last object; ISO 8601, UTC
    channels: tuple[str, ...]  # that point to it
    yanked: dict[str, str] | None  # reason, who, time; `unproven` where it is not signed as it should be
    signed: bool  # there is a signature; `verify` checks it
    whole: bool  # it has a manifest, so readers see it
    fault: str | None = None  # why its manifest or yank record cannot be read


@dataclass(frozen=True)
class Verified:
    """A release of which every object was read and is what its manifest lists."""

    model: str
    sha256: str
    uri: str
    bytes: int
    files: int
    signature: str  # none, unchecked (publish.verify_key is not set) or valid
    packaged: str | None  # when, by its provenance; ISO 8601, UTC
    yanked: dict[str, str] | None


def releases(settings: Publish, model: str | None = None, *, key: str = "publish.to") -> list[Published]:
    """Returns all releases, or those of one model, the oldest first; also those that nobody has completed.

    What others left there does not hide the rest: a release whose manifest or yank record cannot be read has a `fault`,
    and a pointer that cannot be read, is another's, or is not signed as `publish.verify_key` asks, points to nothing.

    Raises:
        UserError: the store cannot be reached.
    """
    store = open_store(settings, key=key, consequence="ask again later")
    groups: dict[str, list[Entry]] = {}
    channels: dict[str, list[str]] = {}
    for entry in store.entries(f"{model}/" if model else ""):
        if match := re.fullmatch(r"([^/]+/sha256-[0-9a-f]{12})/[^/]+", entry.name):
            groups.setdefault(match[1], []).append(entry)
        elif match := re.fullmatch(r"([^/]+)/channels/([^/]+)\.json", entry.name):
            pointer = manifest.pointer(store, entry.name, match[1], match[2], settings)
            channels.setdefault(pointer.prefix if pointer else "", []).append(match[2])
    rows = [_row(store, prefix, entries, channels.get(prefix, ()), settings) for prefix, entries in groups.items()]
    return sorted(rows, key=lambda row: (row.model, row.time, row.uri))


def _row(store: Store, prefix: str, entries: list[Entry], channels: Iterable[str], settings: Publish) -> Published:
    names = {Path(entry.name).name: entry for entry in entries}
    model, _, sha256 = prefix.partition("/sha256-")
    content = store.read(f"{prefix}/{MANIFEST}") if MANIFEST in names else None
    place, fault, yanked = f"{store.uri}/{prefix}", None, None
    try:
        if content:
            sha256 = manifest.manifest(content[0], f"{place}/{MANIFEST}").sha256
            yanked = manifest.yanked(store, f"{place}/{YANKED}", f"{prefix}/{YANKED}", model, sha256, settings)
    except UserError as error:
        fault = terminal.shown(error)
    return Published(
        model=model,
        sha256=sha256,
        uri=place,
        bytes=sum(entry.bytes for entry in entries),
        files=len(entries),
        time=(names[MANIFEST].time if content else max(entry.time for entry in entries)).isoformat(),
        channels=tuple(sorted(channels)),
        yanked=yanked,
        signed=SIGNATURE in names,
        whole=content is not None,
        fault=fault,
    )


def verify(uri: str, settings: Publish, *, key: str = "publish.to") -> Verified:
    """Reads every object of a release, which `find` would find, and returns what it is.

    Raises:
        UserError: naming each object that is missing, differs from the manifest or is not listed in it, a line each;
            the release is not signed as `publish.verify_key` asks; or the store cannot be reached.
    """
    found = manifest.open_release(manifest.locate(uri, settings, key), settings)
    wrong = []
    for name, expected in found.files.items():
        got = found.store.digest(name, reread=True)
        if got is None:
            wrong.append(f"{found.uri}/{name}: is listed in {MANIFEST} and missing")
        elif got != expected:
            wrong.append(manifest.differs(f"{found.uri}/{name}", expected, got))
    # What is listed and not there was told above.
    wrong += [
        f"{found.uri}/{entry.name}: has {entry.bytes} bytes, and {MANIFEST} lists {found.sizes[entry.name]}"
        for entry in found.store.entries("")
        if entry.bytes != found.sizes.get(entry.name, entry.bytes)
    ]
    entries = found.store.entries("")
    others = {MANIFEST, YANKED, SIGNATURE}
    wrong += [
        f"{found.uri}/{terminal.shown(entry.name)}: is not listed in {MANIFEST}; find out who added it, delete it"
        for entry in entries
        if entry.name not in others and entry.name not in found.files
    ]
    if wrong:
        more = [f"{found.uri}: and {len(wrong) - _MOST_LINES} more"] if len(wrong) > _MOST_LINES else []
        raise UserError("\n".join(wrong[:_MOST_LINES] + more))
    signature = "none" if found.signature is None else "valid" if settings.verify_key else "unchecked"
    total = sum(entry.bytes for entry in entries)
    return Verified(
        model=found.model,
        sha256=found.sha256,
        uri=found.uri,
        bytes=total,
        files=len(entries),
        signature=signature,
        packaged=found.packaged,
        yanked=found.yanked,
    )
