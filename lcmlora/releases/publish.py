"""Publishing releases to a directory, S3 or the hub: each gets an immutable folder, which a channel's pointer can name.

    TO/MODEL/sha256-<first 12 of the weights' SHA-256>/{SHA256SUMS, weights, scheduler, card, ..., manifest.json}
    TO/MODEL/channels/champion.json

SHA256SUMS is written first and lists the release's files. If two publishers run at once, one of them creates it; the
other must have the same files, or it stops. The manifest is written last: readers skip a folder without one, and the
next run completes it. SHA256SUMS.sig and yanked.json may be added later. Only these two and a channel's pointer are
ever replaced, by compare and swap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lcmlora.config import Publish
from lcmlora.errors import Unavailable, UserError
from lcmlora.io import terminal
from lcmlora.releases import bundle, manifest, removal
from lcmlora.releases.bundle import Provenance
from lcmlora.releases.manifest import MANIFEST, YANKED
from lcmlora.releases.stores.store import Store, open_store
from lcmlora.releases.trust import records, replay_protection, signing
from lcmlora.releases.trust.records import Record, Yank
from lcmlora.releases.trust.signing import SIGNATURE


def publish_release(folder: Path, model: str, settings: Publish) -> str:
    """Publishes the bundle in `folder` and returns the release's address. An existing release stays as it is.

    Of several stores in `publish.to` this is the first one.

    A release is identified by its weights: the same weights packaged again, with other timings in the metrics, are
    the release that exists already.

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
    # Signed before anything is written, so that a key that does not work leaves no half release.
    signature = signing.sign(checksums, settings.signing_key) if settings.signing_key else None
    store = open_store(settings.of(model))
    prefix = manifest.release_prefix(model, sha256)
    store.prepare(model)
    removal.refuse_pruned(store, prefix)
    if not _is_published(store, model, sha256):
        _claim(store, prefix, folder / bundle.CHECKSUMS, claim)
        # Another publisher may have completed a release of this adapter since.
        if not _is_published(store, model, sha256):
            _upload(store, prefix, folder, sums)
            _sign(store, prefix, checksums, signature, settings)
            _complete(store, prefix, folder, sums)
            _restore_deleted(store, prefix, folder, sums)
            return f"{store.uri}/{prefix}"
    _sign(store, prefix, checksums, signature, settings)
    return f"{store.uri}/{prefix}"


def _expect_model(folder: Path, model: str) -> None:
    place = folder / bundle.PROVENANCE
    if (found := Provenance.read(place).model) != model:
        raise UserError(f"{place}: model: is {terminal.shown(repr(found))}, expected {model!r}; package it as that")


def _claim(store: Store, prefix: str, checksums: Path, sha256: str) -> None:
    """Creates SHA256SUMS. Raises UserError where another publisher has begun this release with other files."""
    name = f"{prefix}/{bundle.CHECKSUMS}"
    store.create(name, checksums, sha256)
    found = store.digest(name)
    if found != sha256 and store.read(f"{prefix}/{MANIFEST}") is None:
        shown = f"holds sha256 {found[:12]}..." if found else "is missing"
        raise UserError(
            f"{store.uri}/{name}: {shown}, expected {sha256[:12]}...; another publisher began this release with other "
            f"files: if it is at work, run again when it has ended, else delete the prefix {prefix} (it has no "
            f"{MANIFEST}) and run again"
        )


def _upload(store: Store, prefix: str, folder: Path, sums: dict[str, str]) -> None:
    store.create_many({f"{prefix}/{name}": (folder / name, sha256) for name, sha256 in sums.items()})
    # Checked after all have been written: whichever publisher wrote an object, it must be the listed one.
    for name, sha256 in sums.items():
        _check_object(store, f"{prefix}/{name}", sha256)


def _complete(store: Store, prefix: str, folder: Path, sums: dict[str, str]) -> None:
    """Writes the manifest, which makes the release visible to readers."""
    made = Provenance.read(folder / bundle.PROVENANCE)
    identity = {"model": made.model, "sha256": bundle.digest(folder)} | (
        {"adapter": made.adapter} if made.adapter else {}
    )
    files = [{"name": n, "bytes": (folder / n).stat().st_size, "sha256": s} for n, s in sorted(sums.items())]
    content = json.dumps(identity | {"files": files}, indent=2, sort_keys=True) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()
    if not store.create(f"{prefix}/{MANIFEST}", content.encode(), digest):
        _check_object(store, f"{prefix}/{MANIFEST}", digest)


def _restore_deleted(store: Store, prefix: str, folder: Path, sums: dict[str, str]) -> None:
    """Uploads the files that `removal.remove` has deleted meanwhile, as it had begun before the upload.

    Raises:
        Unavailable: it is still at work.
    """
    removal.refuse_pruned(store, prefix)
    if not {*sums, MANIFEST} <= removal.sizes(store, prefix).keys():
        _upload(store, prefix, folder, sums)
        _complete(store, prefix, folder, sums)


def _sign(store: Store, prefix: str, checksums: bytes, signature: bytes | None, settings: Publish) -> None:
    """Adds the signature where there is none. Raises UserError where there is one by another key."""
    if signature is None or settings.signing_key is None:
        return
    name = f"{prefix}/{SIGNATURE}"
    published = store.read(f"{prefix}/{bundle.CHECKSUMS}")
    present = store.read(name)
    if present is None and published is not None and published[0] != checksums:
        raise UserError(
            f"{store.uri}/{prefix}: is unsigned, and its {bundle.CHECKSUMS} (sha256 "
            f"{hashlib.sha256(published[0]).hexdigest()[:12]}...) is not that of this run "
            f"({hashlib.sha256(checksums).hexdigest()[:12]}...), which alone may be signed; publish without "
            "publish.signing_key, or sign the folder that was published"
        )
    if present is None and store.create(name, signature, hashlib.sha256(signature).hexdigest()):
        return
    present = present or store.read(name)
    if present and published:
        signing.check_own(published[0], present[0], settings.signing_key, f"{store.uri}/{name}")


def point_channel(model: str, sha256: str, settings: Publish, channel: str = "champion") -> str:
    """Points the channel at a published release and returns the pointer's address. Idempotent.

    Where publish.signing_key is set, the pointer has the time and a signature. A pointer to the right release without
    a signature by that key is written again.

    Raises:
        UserError: there is no such release, it was yanked, the pointer is signed and no key is set, or another
            publisher moved it at the same moment.
    """
    for name in (model, channel):
        if not records.is_name(name):
            raise UserError(f"{terminal.shown(repr(name))}: expected the name of a model and of a channel")
    store = open_store(settings.of(model), consequence="the channel was not moved, and the next run moves it")
    prefix = manifest.release_prefix(model, sha256)
    if not _is_published(store, model, sha256):
        raise UserError(f"{store.uri}/{prefix}: no {MANIFEST}, so no release to point {channel} at")
    _refuse_unusable(store, prefix, settings)
    name = f"{model}/channels/{channel}.json"
    place = f"{store.uri}/{name}"
    fields = {"model": model, "channel": channel, "sha256": sha256, "release": f"{store.uri}/{prefix}"}
    current = store.read(name)
    signed = settings.signing_key is not None
    newest = replay_protection.newest_pointer_time(model, channel, store.uri, settings) if signed else None
    kept = _valid_pointer(current[0], place, settings) if current else None
    if kept and newest and records.parse_time(kept.fields.get("time"), place) < newest:
        kept = None  # somebody put an older pointer to the same release back, which readers refuse
    if kept is None or {key: kept.fields.get(key) for key in fields} != fields:
        time = _time_after(kept, newest)
        content = records.serialize_record(records.POINTER, fields | {"time": time}, settings.signing_key)
        moved = store.swap(name, content, current[1] if current else None)
        if moved:
            _put_back(store, name, prefix, content, current)
        after = None if moved else store.read(name)
        if not moved and (after is None or _read_pointer(after[0], place).sha256 != sha256):
            raise UserError(f"{place}: another publisher moved it just now; look at it, then run again")
        if moved and signed:
            replay_protection.accept_pointer(_read_pointer(content, place), store.uri, channel, settings, place)
    store.show(name)
    # A yank checks the channels before it is written, perhaps just before this one was moved.
    _refuse_unusable(store, prefix, settings)
    return place


def _put_back(store: Store, name: str, prefix: str, content: bytes, former: tuple[bytes, str] | None) -> None:
    """Points a channel back to the release that it named before, if the new one is being deleted since just now.

    Raises:
        Unavailable: the new one is being deleted.
    """
    try:
        removal.refuse_pruned(store, prefix)
    except UserError:
        tag = store.read(name)
        if tag is not None and tag[0] == content and former is not None:
            store.swap(name, former[0], tag[1])
        elif tag is not None and tag[0] == content:
            store.delete(name)
        raise


def _read_pointer(content: bytes, place: str) -> records.Pointer:
    return records.pointer_of(records.read_record(records.POINTER, content, place), place)


def _valid_pointer(content: bytes, place: str, settings: Publish) -> Record | None:
    """Returns the present pointer, None where readers refuse it, so that it must be written again.

    Raises:
        UserError: it is signed, and there is no key to sign another one.
    """
    try:
        record = records.read_record(records.POINTER, content, place)
    except UserError:
        return None  # the new pointer replaces it, and keeps nothing of it
    if settings.signing_key is not None:
        # Readers refuse a pointer with another key, and one from the future, which a wrong clock has written.
        own = records.is_signed_by(record, settings.signing_key, place)
        return record if own and not records.is_future(records.parse_time(record.fields["time"], place)) else None
    if record.signature is not None:
        raise UserError(
            f"{place}: is signed, and publish.signing_key is not set: readers would refuse the new one; set it, or "
            "delete this pointer if releases are not to be signed any more"
        )
    return record


def _time_after(former: Record | None, newest: datetime | None) -> str:
    """Returns the present time, or one that is later than former pointers, if another publisher's clock was ahead."""
    times = [] if newest is None else [newest]
    if former is not None and former.signature is not None:
        times.append(records.parse_time(former.fields["time"], ""))
    now = datetime.now(UTC)
    # Readers refuse a pointer from the future, so the new one need not be later than that.
    later = [time + timedelta(microseconds=1) for time in times if not records.is_future(time)]
    return max([now, *later]).isoformat(timespec="microseconds")


def point_channel_of(model: str, sha256: str, uri: str, settings: Publish, channel: str = "champion") -> str:
    """Points the channel in the store of the release at `uri` at it. That store need not be publish.to.

    See `point_channel`.
    """
    to = uri.rpartition(f"/{model}/sha256-")[0]
    if not to:
        raise UserError(f"{terminal.shown(uri)}: is not the address of a release of {model}, so no channel follows")
    return point_channel(model, sha256, settings.model_copy(update={"to": to}), channel)


def point_channels_of(
    model: str, sha256: str, uris: Sequence[str], settings: Publish, channel: str = "champion"
) -> list[str]:
    """Points the channel in each store that has the release at it, and returns the pointers' addresses.

    Args:
        uris: the addresses of the release, one for each store.

    Raises:
        UserError: it was not moved in some of them, after all have been tried; each is named.
    """
    moved, errors = [], []
    for uri in uris:
        try:
            moved.append(point_channel_of(model, sha256, uri, settings, channel))
        except UserError as error:
            errors.append(error)
    if errors:
        also = f"; it was moved at {', '.join(moved)}" if moved else ""
        kind = Unavailable if all(isinstance(error, Unavailable) for error in errors) else UserError
        raise kind("; ".join(map(str, errors)) + also) from errors[0]
    return moved


def _refuse_unusable(store: Store, prefix: str, settings: Publish) -> None:
    """Raises UserError where readers would refuse the release, or it is being deleted."""
    removal.refuse_pruned(store, prefix)
    release = manifest.open_release(f"{store.uri}/{prefix}", settings)
    manifest.refuse_yanked(release.yanked, release.uri, "no channel can point to it; take another release")


def yank_release(uri: str, settings: Publish, *, reason: str, who: str, key: str = "publish.to") -> str:
    """Marks a release as not to be used any more and returns the address of that record. The release's files stay.

    Args:
        uri: as for `manifest.locate`.
        key: the setting or option that names the store, for messages.

    Raises:
        UserError: there is no such release, a channel points to it, it was yanked before with another reason, or the
            store cannot be reached.
    """
    if not reason.strip():
        raise UserError("--reason: is empty; say why nobody should use this release")
    address = manifest.locate(uri, settings, key)
    # A release with wrong files or a wrong signature can be yanked too, so only the manifest is read.
    store = manifest.open_address(address, settings)
    sha256 = manifest.parse_manifest(manifest.read_manifest(store), f"{store.uri}/{MANIFEST}").sha256
    root, name = manifest.split_address(store.uri)
    channels = open_store(settings.model_copy(update={"to": root}), key=store.uri, consequence="it was not yanked")
    if pointing := _pointing(channels, name):
        raise UserError(f"{store.uri}: {', '.join(pointing)} points to it; roll back first, then yank it")
    time = datetime.now(UTC).isoformat(timespec="seconds")
    model = name.partition("/")[0]
    fields = {"model": model, "sha256": sha256, "reason": reason, "who": who, "time": time}
    content = records.serialize_record(records.YANK, fields, settings.signing_key)
    if not store.create(YANKED, content, hashlib.sha256(content).hexdigest()):
        _sign_yank(store, fields, settings)
    elif settings.signing_key is not None:
        replay_protection.accept_yank(Yank(reason, who, time), root, model, sha256, settings)
    if pointing := _pointing(channels, name):
        raise UserError(f"{store.uri}: was yanked, and {', '.join(pointing)} was pointed to it meanwhile; roll back")
    return f"{store.uri}/{YANKED}"


def _sign_yank(store: Store, fields: dict[str, str], settings: Publish) -> None:
    """Signs the present yank record, where it is not signed and there is a key. Its time stays.

    Raises:
        UserError: it has another reason, or is another person's.
    """
    place, present = f"{store.uri}/{YANKED}", store.read(YANKED)
    if present is None:
        raise UserError(f"{place}: was deleted just now; run again")
    record = records.read_record(records.YANK, present[0], place)
    if (record.text("reason"), record.text("who")) != (fields["reason"], fields["who"]):
        yank = Yank(*(terminal.shown(record.text(key)) for key in ("reason", "who", "time")))
        manifest.refuse_yanked(yank, store.uri, "it stays so")
    if settings.signing_key is None or records.is_signed_by(record, settings.signing_key, place):
        return
    content = records.serialize_record(records.YANK, fields | {"time": record.text("time")}, settings.signing_key)
    if not store.swap(YANKED, content, present[1]):
        raise UserError(f"{place}: was changed just now; look at it, then run again")


def _pointing(store: Store, prefix: str) -> list[str]:
    """Returns the channels that point to MODEL/sha256-<12 digits>."""
    channels = []
    model = prefix.rpartition("/")[0]
    for entry in store.entries(f"{model}/channels/"):
        channel = Path(entry.name).stem
        pointer = manifest.read_pointer(store, entry.name, model, channel) if entry.name.endswith(".json") else None
        if pointer and pointer.prefix == prefix:
            channels.append(channel)
    return channels


def _is_published(store: Store, model: str, sha256: str) -> bool:
    """Returns whether there is a whole release of this adapter. Raises UserError where it is another adapter's."""
    name = f"{manifest.release_prefix(model, sha256)}/{MANIFEST}"
    found = store.read(name)
    if found is None:
        return False
    place = f"{store.uri}/{name}"
    listed = manifest.parse_manifest(found[0], place)
    if (listed.model, listed.sha256) != (model, sha256):
        raise UserError(
            f"{place}: is the release of adapter {listed.sha256} of {listed.model}, expected {sha256} of {model}"
        )
    return True


def _check_object(store: Store, name: str, sha256: str) -> None:
    """Raises UserError where a stored object is missing or has another SHA-256."""
    found = store.digest(name)
    if found != sha256:
        shown = f"holds sha256 {found[:12]}..." if found else "is missing"
        raise UserError(
            f"{store.uri}/{name}: {shown}, expected {sha256[:12]}...; another publisher left it there: if no other "
            f"run is publishing now, delete the prefix {Path(name).parent} (it has no {MANIFEST}) and run again"
        )
