"""Published releases, in a directory or on S3: an immutable prefix each, its manifest last, and a channel's pointer.

    TO/MODEL/sha256-<first 12 of the adapter's SHA-256>/{SHA256SUMS, weights, scheduler, card, ..., manifest.json}
    TO/MODEL/channels/champion.json

SHA256SUMS is written first and says which files this release is made of: of two publishers one creates it, and the
other either has the same files or none to add. A prefix without a manifest is no release: readers skip it, and the next
run completes it. SHA256SUMS.sig and yanked.json may join a release later; nothing in it is ever overwritten.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.parsing import as_object, read_json
from lcmlora.releases import bundle, manifest
from lcmlora.releases.manifest import MANIFEST, YANKED
from lcmlora.releases.stores.store import Store, open_store
from lcmlora.releases.trust import records, rollback_protection, signing
from lcmlora.releases.trust.signing import SIGNATURE


def publish(folder: Path, model: str, settings: Publish) -> str:
    """Publishes the release in `folder` and returns its address. A release that is already there is left as it is.

    The identity of a release is its adapter: the same adapter packaged again, with other timings in its metrics, is
    the release that already stands.

    Raises:
        UserError: the folder does not match its SHA256SUMS or is of another model, the store cannot be reached or
            refuses, or another publisher has begun a release of this adapter with other files.
    """
    bundle.verify(folder)
    _expect_model(folder, model)
    checksums = (folder / bundle.CHECKSUMS).read_bytes()
    claim = hashlib.sha256(checksums).hexdigest()
    sums = {bundle.CHECKSUMS: claim} | bundle.checksums(folder)
    sha256 = bundle.digest(folder)
    # Before anything is written: a key that does not work should not leave half a release.
    signature = signing.sign(checksums, settings.signing_key) if settings.signing_key else None
    store = open_store(settings)
    prefix = manifest.prefix_of(model, sha256)
    if not _published(store, model, sha256):
        _claim(store, prefix, folder / bundle.CHECKSUMS, claim)
        # Another publisher may have been faster with other files, and have ended.
        if not _published(store, model, sha256):
            _fill(store, prefix, folder, sums)
            _sign(store, prefix, checksums, signature, settings)
            _complete(store, prefix, folder, model, sha256, sums)
            return f"{store.uri}/{prefix}"
    _sign(store, prefix, checksums, signature, settings)
    return f"{store.uri}/{prefix}"


def _expect_model(folder: Path, model: str) -> None:
    place = folder / bundle.PROVENANCE
    if (found := as_object(read_json(place), str(place)).get("model")) != model:
        raise UserError(f"{place}: model: is {terminal.shown(repr(found))}, expected {model!r}; package it as that")


def _claim(store: Store, prefix: str, checksums: Path, claim: str) -> None:
    name = f"{prefix}/{bundle.CHECKSUMS}"
    store.create(name, checksums, claim)
    found = store.digest(name)
    if found != claim and store.read(f"{prefix}/{MANIFEST}") is None:
        shown = f"holds sha256 {found[:12]}..." if found else "is missing"
        raise UserError(
            f"{store.uri}/{name}: {shown}, expected {claim[:12]}...; another publisher began this release with other "
            f"files: if it is at work, run again when it has ended, else delete the prefix {prefix} (it has no "
            f"{MANIFEST}) and run again"
        )


def _fill(store: Store, prefix: str, folder: Path, sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        store.create(f"{prefix}/{name}", folder / name, expected)
    # Checked after all have been written: whichever publisher wrote an object, it must be the one that is listed.
    for name, expected in sums.items():
        _expect(store, f"{prefix}/{name}", expected)


def _complete(store: Store, prefix: str, folder: Path, model: str, sha256: str, sums: dict[str, str]) -> None:
    files = [{"name": n, "bytes": (folder / n).stat().st_size, "sha256": s} for n, s in sorted(sums.items())]
    written = _json({"model": model, "sha256": sha256, "files": files})
    digest = hashlib.sha256(written).hexdigest()
    if not store.create(f"{prefix}/{MANIFEST}", written, digest):
        _expect(store, f"{prefix}/{MANIFEST}", digest)


def _sign(store: Store, prefix: str, checksums: bytes, signature: bytes | None, settings: Publish) -> None:
    """Adds the signature where there is none. Raises UserError where that of another key is there."""
    if signature is None or settings.signing_key is None:
        return
    name = f"{prefix}/{SIGNATURE}"
    standing = store.read(f"{prefix}/{bundle.CHECKSUMS}")
    found = store.read(name)
    if found is None and standing is not None and standing[0] != checksums:
        raise UserError(
            f"{store.uri}/{prefix}: is unsigned, and its {bundle.CHECKSUMS} (sha256 "
            f"{hashlib.sha256(standing[0]).hexdigest()[:12]}...) is not that of this run "
            f"({hashlib.sha256(checksums).hexdigest()[:12]}...), which alone may be signed; publish without "
            "publish.signing_key, or sign the folder that was published"
        )
    if found is None and store.create(name, signature, hashlib.sha256(signature).hexdigest()):
        return
    found = found or store.read(name)
    if found and standing:
        signing.check_own(standing[0], found[0], settings.signing_key, f"{store.uri}/{name}")


def point(model: str, sha256: str, settings: Publish, channel: str = "champion") -> str:
    """Points the channel at a published release and returns the pointer's address; idempotent.

    The pointer is signed where publish.signing_key is set, with the time; one that names the release and is not signed
    by that key is written anew.

    Raises:
        UserError: there is no such release, it was yanked, the pointer is signed and no key is set, or another
            publisher moved it at the same moment.
    """
    for name in (model, channel):
        if not records.is_name(name):
            raise UserError(f"{terminal.shown(repr(name))}: expected the name of a model and of a channel")
    store = open_store(settings, consequence="the channel was not moved, and the next run moves it")
    prefix = manifest.prefix_of(model, sha256)
    if not _published(store, model, sha256):
        raise UserError(f"{store.uri}/{prefix}: no {MANIFEST}, so no release to point {channel} at")
    _usable(store, prefix, settings)
    name = f"{model}/channels/{channel}.json"
    place = f"{store.uri}/{name}"
    facts = {"model": model, "channel": channel, "sha256": sha256, "release": f"{store.uri}/{prefix}"}
    current = store.read(name)
    signing_too = settings.signing_key is not None
    newest = rollback_protection.newest_pointer(model, channel, store.uri, settings) if signing_too else None
    former = _standing(current[0], place, settings) if current else None
    if former and newest and records.moment(former.get("time"), place) < newest:
        former = None  # an older one was put back, which names the same release and which readers refuse
    if former is None or {key: former.get(key) for key in facts} != facts:
        content = records.seal(records.POINTER, facts | {"time": _time_after(former, newest)}, settings.signing_key)
        moved = store.swap(name, content, current[1] if current else None)
        after = None if moved else store.read(name)
        if not moved and (after is None or records.pointer(after[0], place).sha256 != sha256):
            raise UserError(f"{place}: another publisher moved it just now; look at it, then run again")
        if moved and signing_too:
            rollback_protection.pass_pointer(records.pointer(content, place), store.uri, channel, settings, place)
    # Whoever yanks looks at the channels before; it may have been this very moment.
    _usable(store, prefix, settings)
    return place


def _standing(content: bytes, place: str, settings: Publish) -> dict[str, Any] | None:
    """Returns the pointer that stands there, None where it is to be written anew whatever it says.

    Raises:
        UserError: it is signed, and there is no key to sign another one.
    """
    try:
        record = records.read(records.POINTER, content, place)
    except UserError:
        return None  # a pointer is replaced, and nothing of it is kept
    if settings.signing_key is not None:
        # Readers refuse one of another key, and one of the future, which a clock that was wrong has written.
        own = records.is_own(records.POINTER, record, settings.signing_key, place)
        return record if own and not records.is_future(records.moment(record["time"], place)) else None
    if "signature" in record:
        raise UserError(
            f"{place}: is signed, and publish.signing_key is not set: readers would refuse the new one; set it, or "
            "delete this pointer if releases are not to be signed any more"
        )
    return record


def _time_after(former: dict[str, Any] | None, newest: datetime | None) -> str:
    """Returns the time, which is later than that of former pointers although the clock of a publisher was ahead."""
    times = [] if newest is None else [newest]
    if former is not None and "signature" in former:
        times.append(records.moment(former["time"], ""))
    now = datetime.now(UTC)
    # One of the future is refused by readers, so none has to be later than it.
    later = [time + timedelta(microseconds=1) for time in times if not records.is_future(time)]
    return max([now, *later]).isoformat(timespec="microseconds")


def follow(model: str, sha256: str, uri: str, settings: Publish, channel: str = "champion") -> str:
    """Points the channel beside the release at `uri` at it, which need not lie where releases go now; see `point`."""
    to = uri.removeprefix("file://").rpartition(f"/{model}/sha256-")[0]
    if not to:
        raise UserError(f"{terminal.shown(uri)}: is not the address of a release of {model}, so no channel follows")
    return point(model, sha256, settings.model_copy(update={"to": to}), channel)


def _usable(store: Store, prefix: str, settings: Publish) -> None:
    found = manifest.open_release(f"{store.uri}/{prefix}", settings)
    manifest.refuse_yanked(found.yanked, found.uri, "no channel can point to it; take another release")


def yank(uri: str, settings: Publish, *, reason: str, who: str, key: str = "publish.to") -> str:
    """Marks a release as not to be used any more and returns the address of that record; its files stay.

    Raises:
        UserError: there is no such release, a channel points to it, it was yanked before with another reason, or the
            store cannot be reached.
    """
    if not reason.strip():
        raise UserError("--reason: is empty; say why nobody should use this release")
    address = manifest.locate(uri, settings, key)
    # A release with wrong files or a wrong signature can be yanked too, so nothing but the manifest is read.
    store = manifest.reader(address, settings)
    sha256 = manifest.manifest(manifest.manifest_of(store), f"{store.uri}/{MANIFEST}").sha256
    root, name = manifest.split(store.uri)
    channels = open_store(settings.model_copy(update={"to": root}), key=store.uri, consequence="it was not yanked")
    if pointing := _pointing(channels, name):
        raise UserError(f"{store.uri}: {', '.join(pointing)} points to it; roll back first, then yank it")
    time = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"model": name.partition("/")[0], "sha256": sha256, "reason": reason, "who": who, "time": time}
    content = records.seal(records.YANK, facts, settings.signing_key)
    if not store.create(YANKED, content, hashlib.sha256(content).hexdigest()):
        _yank_again(store, facts, settings)
    elif settings.signing_key is not None:
        rollback_protection.pass_yank(facts, root, facts["model"], sha256, settings)
    if pointing := _pointing(channels, name):
        raise UserError(f"{store.uri}: was yanked, and {', '.join(pointing)} was pointed to it meanwhile; roll back")
    return f"{store.uri}/{YANKED}"


def _yank_again(store: Store, facts: dict[str, str], settings: Publish) -> None:
    """Signs a yank record that is there, where it is not signed and there is a key; the first reason stands."""
    place, found = f"{store.uri}/{YANKED}", store.read(YANKED)
    if found is None:
        raise UserError(f"{place}: was deleted just now; run again")
    record = records.read(records.YANK, found[0], place)
    if (record["reason"], record["who"]) != (facts["reason"], facts["who"]):
        manifest.refuse_yanked(
            {key: terminal.shown(record[key]) for key in facts if key in record}, store.uri, "it stays so"
        )
    if settings.signing_key is None or records.is_own(records.YANK, record, settings.signing_key, place):
        return
    content = records.seal(records.YANK, facts | {"time": str(record["time"])}, settings.signing_key)
    if not store.swap(YANKED, content, found[1]):
        raise UserError(f"{place}: was changed just now; look at it, then run again")


def _pointing(store: Store, prefix: str) -> list[str]:
    """Returns the channels that point to MODEL/sha256-<12>."""
    found = []
    model = prefix.rpartition("/")[0]
    for entry in store.entries(f"{model}/channels/"):
        channel = Path(entry.name).stem
        pointer = manifest.pointer(store, entry.name, model, channel) if entry.name.endswith(".json") else None
        if pointer and pointer.prefix == prefix:
            found.append(channel)
    return found


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _published(store: Store, model: str, sha256: str) -> bool:
    name = f"{manifest.prefix_of(model, sha256)}/{MANIFEST}"
    found = store.read(name)
    if found is None:
        return False
    place = f"{store.uri}/{name}"
    written = manifest.manifest(found[0], place)
    if (written.model, written.sha256) != (model, sha256):
        theirs = f"{written.sha256} of {written.model}"
        raise UserError(f"{place}: is the release of adapter {theirs}, expected {sha256} of {model}")
    return True


def _expect(store: Store, name: str, sha256: str) -> None:
    found = store.digest(name)
    if found != sha256:
        shown = f"holds sha256 {found[:12]}..." if found else "is missing"
        raise UserError(
            f"{store.uri}/{name}: {shown}, expected {sha256[:12]}...; another publisher left it there: if no other "
            f"run is publishing now, delete the prefix {Path(name).parent} (it has no {MANIFEST}) and run again"
        )
