"""What is published: the list of all releases; one of them found, downloaded, or examined object by object."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.files import make_once, sha256_file
from lcmlora.releases import bundle, manifest
from lcmlora.releases.manifest import ADAPTER, MANIFEST, YANKED
from lcmlora.releases.stores.store import Entry, Store, open_store
from lcmlora.releases.trust.signing import SIGNATURE

_MOST_LINES = 20  # of what is wrong with a release
_LONGEST_LINK = 7 * 24 * 3600  # seconds, of signature version 4


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


def find(uri: str, settings: Publish, *, yanked: bool = False, key: str = "publish.to") -> tuple[str, str]:
    """Returns the address of a published release, and its adapter's SHA-256.

    Args:
        uri: MODEL@CHANNEL or MODEL/sha256-<first digits> below `settings.to`; or the address or path of a release or
            of a channel's pointer: s3://bucket/.../MODEL/sha256-..., file:///..., a directory's path,
            .../MODEL/channels/champion.json.
        settings: where releases are, how S3 is reached, and by whose key they must be signed.
        yanked: take it although it was yanked.
        key: what messages say of who named the store.

    Raises:
        UserError: there is no whole release, it was yanked, it is not signed as `publish.verify_key` asks, or the store
            cannot be reached.
    """
    found = _open(uri, settings, key, yanked)
    return found.uri, found.sha256


def download(uri: str, settings: Publish, folder: Path, *, everything: bool = True, yanked: bool = False) -> None:
    """Writes the files of a release to the folder, and its signature where there is one.

    Args:
        uri: what `find` accepts.
        everything: False leaves out what drawing does not need: all but weights, scheduler, provenance and SHA256SUMS.
        yanked: take it although it was yanked.

    Raises:
        UserError: a file is missing or is not the one that the manifest lists, the release is not signed as
            `publish.verify_key` asks or was yanked, a file cannot be written, or the store cannot be reached.
    """
    found = _open(uri, settings, "publish.to", yanked)
    _download(found, folder, folder, everything)


def pull(
    uri: str,
    settings: Publish,
    out: Path,
    *,
    everything: bool = False,
    yanked: bool = False,
    key: str = "publish.to",
) -> Path:
    """Writes a release to the folder `out`, whole or not at all, and returns `out`.

    Args:
        uri, yanked, key: as of `find`.
        everything: False leaves out what drawing does not need.

    Raises:
        UserError: as of `download`; or `out` is there, and is neither an empty folder nor this very release.
    """
    found = _open(uri, settings, key, yanked)
    try:
        make_once(
            out,
            lambda: _is_release(out, found, everything),
            lambda folder: _download(found, folder, out, everything),
        )
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; nothing was left there") from None
    return out


def links(uri: str, settings: Publish, seconds: int, *, key: str = "publish.to") -> dict[str, str]:
    """Returns name -> address of every file of a release, at which anybody can read it for so many seconds.

    Raises:
        UserError: as of `find`; the release is in a directory; or more than 7 days were asked for.
    """
    if not 1 <= seconds <= _LONGEST_LINK:
        raise UserError(f"--expires: expected 1 to {_LONGEST_LINK} seconds (7 days), got {seconds}")
    found = _open(uri, settings, key, yanked=False)
    names = [*found.files, MANIFEST, *([SIGNATURE] if found.signature else [])]
    return {name: found.store.link(name, seconds) for name in names}


def _open(uri: str, settings: Publish, key: str, yanked: bool) -> manifest.Release:
    found = manifest.open_release(manifest.locate(uri, settings, key), settings)
    if not yanked:
        manifest.refuse_yanked(found.yanked, found.uri, "take another release, or pull it with --yanked all the same")
    return found


def _download(found: manifest.Release, folder: Path, shown: Path, everything: bool) -> None:
    """Writes to `folder`; messages speak of `shown`."""
    wanted = [name for name in found.files if name != bundle.CHECKSUMS and (everything or name in ADAPTER)]
    for name in ADAPTER:
        if name not in wanted:
            raise UserError(f"{found.uri}/{MANIFEST}: does not list {name}, so this is no adapter's release")
    name = bundle.CHECKSUMS
    try:
        (folder / name).write_bytes(found.checksums)
        if found.signature is not None:
            (folder / SIGNATURE).write_bytes(found.signature)
        for name in wanted:
            _fetch(found, name, folder / name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{shown}: {Path(error.filename or name).name} cannot be written: {reason}") from None


def _fetch(found: manifest.Release, name: str, target: Path) -> None:
    if not found.store.fetch(name, target, found.sizes[name]):
        raise UserError(f"{found.uri}/{name}: is listed in {MANIFEST} and missing")
    if (got := sha256_file(target)) != found.files[name]:
        target.unlink()
        raise UserError(manifest.differs(f"{found.uri}/{name}", found.files[name], got))


def _is_release(out: Path, found: manifest.Release, everything: bool) -> bool:
    """Returns whether `out` is this release already, False where it can be written. Raises UserError where neither."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if out.is_dir():
        there = {path.name: path for path in out.iterdir()}
        wanted = set(found.files) if everything else {*ADAPTER, bundle.CHECKSUMS}
        known = found.files | ({SIGNATURE: hashlib.sha256(found.signature).hexdigest()} if found.signature else {})
        if wanted <= there.keys() and all(
            path.is_file() and sha256_file(path) == known.get(name) for name, path in there.items()
        ):
            return True
    raise UserError(
        f"--out: {out}: is there, and is neither an empty folder nor the release {found.sha256[:12]}...; name another "
        "folder, or remove it"
    )
