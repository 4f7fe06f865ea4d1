"""Reading published releases: listing them all, finding one, downloading it, verifying every object of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lcmlora.config import Publish
from lcmlora.errors import NotFound, UserError
from lcmlora.extras import MissingExtra
from lcmlora.io import terminal
from lcmlora.io.files import make_once, sha256_file
from lcmlora.releases import bundle, manifest
from lcmlora.releases.manifest import MANIFEST, YANKED
from lcmlora.releases.stores.store import Entry, Store, open_store
from lcmlora.releases.trust.records import Yank
from lcmlora.releases.trust.signing import SIGNATURE

_MOST_LINES = 20  # of a message about one release
_LONGEST_LINK = 7 * 24 * 3600  # seconds; the limit of AWS signature version 4


@dataclass(frozen=True)
class Published:
    """A release in a store, or an unfinished one that a publisher has left or still writes."""

    model: str
    sha256: str  # of the weights; where there is no manifest only its first 12 digits are known
    uri: str
    bytes: int
    files: int
    time: str  # of its manifest, else of its newest object; ISO 8601, UTC
    channels: tuple[str, ...]  # the channels that point to it
    yanked: Yank | None
    signed: bool  # has a signature, which `verify_release` checks
    whole: bool  # has a manifest, so that readers see it
    fault: str | None = None  # why its manifest or yank record cannot be read


@dataclass(frozen=True)
class Verified:
    """A release whose every object was read and has the SHA-256 that the manifest lists."""

    model: str
    sha256: str
    uri: str
    bytes: int
    files: int
    signature: str  # none, unchecked (publish.verify_key is not set) or valid
    packaged: str | None  # time, by its provenance; ISO 8601, UTC
    yanked: Yank | None


def list_releases(settings: Publish, model: str | None = None, *, key: str = "publish.to") -> list[Published]:
    """Returns all releases, or those of one model, the oldest first, including unfinished ones.

    A damaged release does not hide the others: it has a `fault`. A pointer that cannot be read, is another channel's,
    or is not signed as `publish.verify_key` asks, is ignored with a warning.

    Raises:
        UserError: the store cannot be reached.
    """
    store = open_store(settings.of(model) if model else settings, key=key, consequence="ask again later")
    groups: dict[str, list[Entry]] = {}
    channels: dict[str, list[str]] = {}
    for entry in store.entries(f"{model}/" if model else ""):
        if match := re.fullmatch(r"([^/]+/sha256-[0-9a-f]{12})/[^/]+", entry.name):
            groups.setdefault(match[1], []).append(entry)
        elif match := re.fullmatch(r"([^/]+)/channels/([^/]+)\.json", entry.name):
            pointer = manifest.read_pointer(store, entry.name, match[1], match[2], settings)
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
            sha256 = manifest.parse_manifest(content[0], f"{place}/{MANIFEST}").sha256
            yanked = manifest.read_yank(store, f"{place}/{YANKED}", f"{prefix}/{YANKED}", model, sha256, settings)
    except MissingExtra:  # says nothing about the release
        raise
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


def verify_release(uri: str, settings: Publish, *, key: str = "publish.to") -> Verified:
    """Reads every object of a release and compares it with the manifest.

    Args:
        uri, key: as for `find_release`.

    Raises:
        UserError: naming each object that is missing, differs from the manifest or is not listed in it, a line each;
            the release is not signed as `publish.verify_key` asks; or the store cannot be reached.
    """
    found = manifest.open_release(manifest.locate(uri, settings, key), settings)
    faults = []
    for name, expected in found.files.items():
        got = found.store.digest(name, reread=True)
        if got is None:
            faults.append(f"{found.uri}/{name}: is listed in {MANIFEST} and missing")
        elif got != expected:
            faults.append(manifest.mismatch(f"{found.uri}/{name}", expected, got))
    faults += [
        f"{found.uri}/{entry.name}: has {entry.bytes} bytes, and {MANIFEST} lists {found.sizes[entry.name]}"
        for entry in found.store.entries("")
        if entry.bytes != found.sizes.get(entry.name, entry.bytes)
    ]
    entries = found.store.entries("")
    unlisted = {MANIFEST, YANKED, SIGNATURE}
    faults += [
        f"{found.uri}/{terminal.shown(entry.name)}: is not listed in {MANIFEST}; find out who added it, delete it"
        for entry in entries
        if entry.name not in unlisted and entry.name not in found.files
    ]
    if faults:
        more = [f"{found.uri}: and {len(faults) - _MOST_LINES} more"] if len(faults) > _MOST_LINES else []
        raise UserError("\n".join(faults[:_MOST_LINES] + more))
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


def find_release(uri: str, settings: Publish, *, yanked: bool = False, key: str = "publish.to") -> tuple[str, str]:
    """Returns the address of a published release, and the SHA-256 of its adapter.

    Args:
        uri: MODEL@CHANNEL or MODEL/sha256-<first digits> below `settings.to`; or the address or path of a release or
            of a channel's pointer: s3://bucket/.../MODEL/sha256-..., file:///..., a directory's path,
            .../MODEL/channels/champion.json.
        settings: the store, how S3 is reached, and the key that releases must be signed by.
        yanked: accept a release that was yanked.
        key: the setting or option that names the store, for messages.

    Raises:
        UserError: there is no whole release, it was yanked, it is not signed as `publish.verify_key` asks, or the store
            cannot be reached.
    """
    found = _open(uri, settings, key, yanked)
    return found.uri, found.sha256


def find_digits(digits: str, settings: Publish, *, key: str = "publish.to") -> str:
    """Returns the address of the release in a store whose adapter's SHA-256 begins with these digits.

    Args:
        digits: of the weights as they were released, or as they were trained; 12 or more.
        key: as for `find_release`.

    Raises:
        UserError: there is no such release, or there are several; or the store cannot be reached.
    """
    store = open_store(settings, key=key, consequence="ask again later")
    prefixes = [
        entry.name.removesuffix(f"/{MANIFEST}")
        for entry in store.entries("")
        if re.fullmatch(rf"[^/]+/sha256-[0-9a-f]{{12}}/{re.escape(MANIFEST)}", entry.name)
    ]
    # The folder's name has the digits of the released weights, so that only the others' manifests are read.
    named = [prefix for prefix in prefixes if prefix.endswith(f"/sha256-{digits[:12]}")]
    for candidates in (named, [prefix for prefix in prefixes if prefix not in named]):
        found = [prefix for prefix in candidates if manifest.has_digits(store, prefix, digits)]
        if len(found) > 1:
            raise UserError(f"{digits}: is the adapter of {', '.join(found)} at {store.uri}; name one of these")
        if found:
            return f"{store.uri}/{found[0]}"
    raise NotFound(f"{digits}: no release of an adapter with this SHA-256 at {store.uri}")


def download_release(
    uri: str, settings: Publish, folder: Path, *, everything: bool = True, yanked: bool = False
) -> None:
    """Writes the files of a release to the folder, with its signature if it has one.

    Args:
        uri, yanked: as for `find_release`.
        everything: False writes only weights, scheduler, provenance and SHA256SUMS, which are enough to draw.

    Raises:
        UserError: a file is missing or differs from the manifest, the release is not signed as
            `publish.verify_key` asks or was yanked, a file cannot be written, or the store cannot be reached.
    """
    found = _open(uri, settings, "publish.to", yanked)
    _download(found, folder, folder, everything)


def pull_release(
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
        uri, yanked, key: as for `find_release`.
        everything: as for `download_release`.

    Raises:
        UserError: as for `download_release`; or `out` exists, and is neither an empty folder nor this release.
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


def presigned_links(uri: str, settings: Publish, seconds: int, *, key: str = "publish.to") -> dict[str, str]:
    """Returns name -> address of every file of a release. Anybody can read the file there for so many seconds.

    Args:
        uri, key: as for `find_release`.

    Raises:
        UserError: as for `find_release`; the release is in a directory; or `seconds` is more than 7 days.
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
    """Writes the release to `folder`. Messages name `shown`, where the folder appears when it is complete."""
    names = [name for name in found.files if name != bundle.CHECKSUMS and (everything or name in bundle.DRAWING_FILES)]
    for name in bundle.DRAWING_FILES:
        if name not in names:
            raise UserError(f"{found.uri}/{MANIFEST}: does not list {name}, so this is not the release of an adapter")
    name = bundle.CHECKSUMS
    try:
        (folder / name).write_bytes(found.checksums)
        if found.signature is not None:
            (folder / SIGNATURE).write_bytes(found.signature)
        for name in names:
            _fetch(found, name, folder / name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{shown}: {Path(error.filename or name).name} cannot be written: {reason}") from None


def _fetch(found: manifest.Release, name: str, target: Path) -> None:
    if not found.store.fetch(name, target, found.sizes[name]):
        raise UserError(f"{found.uri}/{name}: is listed in {MANIFEST} and missing")
    if (got := sha256_file(target)) != found.files[name]:
        target.unlink()
        raise UserError(manifest.mismatch(f"{found.uri}/{name}", found.files[name], got))


def _is_release(out: Path, found: manifest.Release, everything: bool) -> bool:
    """Returns True where `out` is this release already, False where it can be written. Raises UserError otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if out.is_dir():
        present = {path.name: path for path in out.iterdir()}
        required = set(found.files) if everything else {*bundle.ADAPTER_FILES}
        known = found.files | ({SIGNATURE: hashlib.sha256(found.signature).hexdigest()} if found.signature else {})
        if required <= present.keys() and all(
            path.is_file() and sha256_file(path) == known.get(name) for name, path in present.items()
        ):
            return True
    raise UserError(
        f"--out: {out}: exists, and is neither an empty folder nor the release {found.sha256[:12]}...; name another "
        "folder, or remove it"
    )
