"""How a published release is found by what it is named, and what must go together in it before anything is used."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io import terminal
from lcmlora.io.parsing import Malformed, as_object, parse_json
from lcmlora.releases import bundle
from lcmlora.releases.stores.store import Store, open_store
from lcmlora.releases.trust import records, rollback_protection, signing
from lcmlora.releases.trust.signing import SIGNATURE

MANIFEST = "manifest.json"
YANKED = "yanked.json"
ADAPTER = (bundle.WEIGHTS, bundle.SCHEDULER, bundle.PROVENANCE)  # what drawing needs

# Of a release, which has some ten files; the adapters of the largest bases have a gigabyte or two.
_MOST_FILES = 1000
_MOST_BYTES = 64 << 30


@dataclass(frozen=True)
class File:
    """A file that a manifest lists."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest.json says, which is not signed: SHA256SUMS and provenance.json have to say the same."""

    model: str
    sha256: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Release:
    """A whole release whose manifest, SHA256SUMS, provenance and address say the same, signed as verify_key asks."""

    store: Store  # of its own prefix
    uri: str
    model: str
    sha256: str
    packaged: str | None  # when, by its provenance; None: packaged before that was written down
    checksums: bytes
    files: dict[str, str]  # name -> SHA-256, SHA256SUMS included
    sizes: dict[str, int]  # name -> bytes
    signature: bytes | None
    yanked: dict[str, str] | None


_CHANNEL = re.compile(r"([^/@]+)@([^/@]+)")
_DIGITS = re.compile(r"([^/@]+)/sha256-([0-9a-f]+)")


def is_name(reference: str) -> bool:
    """Returns whether it is a name below `publish.to`, and not an address or a path."""
    return bool(_CHANNEL.fullmatch(reference) or _DIGITS.fullmatch(reference))


def locate(reference: str, settings: Publish, key: str) -> str:
    """Returns the address of the release that is asked for, which may not be there.

    Raises:
        UserError: a channel's pointer is missing, is another's, is not signed as publish.verify_key asks, or is older
            than one that was seen before; or the store cannot be reached.
    """
    if match := _CHANNEL.fullmatch(reference):
        _expect_names(reference, *match.groups())
        store = open_store(settings, key=key, consequence="ask again later")
        return _follow(store, match[1], match[2], settings)
    if match := _DIGITS.fullmatch(reference):
        _expect_names(reference, match[1])
        return _complete_digits(match[1], match[2], open_store(settings, key=key, consequence="ask again later"))
    address = reference.rstrip("/") if "://" in reference else Path(reference).absolute().as_uri()
    if address.endswith(".json"):
        match = re.fullmatch(r"(.*)/([^/]+)/channels/([^/]+)\.json", address)
        if match is None:
            raise UserError(f"{reference}: expected a pointer's address, .../MODEL/channels/CHANNEL.json")
        root, model, channel = match.groups()
        _expect_names(reference, model, channel)
        store = open_store(settings.model_copy(update={"to": root}), key=reference, consequence="ask again later")
        return _follow(store, model, channel, settings)
    return address


def _expect_names(reference: str, *names: str) -> None:
    for name in names:
        if not records.is_name(name):
            raise UserError(
                f"{terminal.shown(reference)}: {terminal.shown(repr(name))} is no name of a model or channel; "
                "expected letters, digits, '.', '_' and '-', 64 at most"
            )


def _complete_digits(model: str, digits: str, store: Store) -> str:
    entries = store.entries(f"{model}/sha256-{digits[:12]}")
    prefixes = [entry.name.rpartition("/")[0] for entry in entries if entry.name.endswith(f"/{MANIFEST}")]
    if len(prefixes) > 1:
        raise UserError(f"{model}/sha256-{digits}: is the beginning of {', '.join(prefixes)}; give more digits")
    for prefix in prefixes:
        found = store.read(f"{prefix}/{MANIFEST}")
        if found and manifest(found[0], f"{store.uri}/{prefix}/{MANIFEST}").sha256.startswith(digits):
            return f"{store.uri}/{prefix}"
    raise UserError(f"{model}/sha256-{digits}: no such release at {store.uri}; see `lcmlora releases list`")


def _follow(store: Store, model: str, channel: str, settings: Publish) -> str:
    name = f"{model}/channels/{channel}.json"
    place = f"{store.uri}/{name}"
    content = store.read(name)
    if content is None:
        raise UserError(f"{place}: no such pointer")
    found = records.pointer(content[0], place)
    records.expect(found, model, channel, place)
    if settings.verify_key:
        record = records.read(records.POINTER, content[0], place)
        remedy = (
            f"run `lcmlora registry promote lcm-lora-{model}@{channel}` where publish.signing_key is set, which writes "
            "it anew"
        )
        records.check(records.POINTER, record, settings, place, remedy)
        if found.channel is None or found.time is None:
            raise UserError(f"{place}: expected a channel and a time in a signed pointer; {remedy}")
        if records.is_future(found.time):
            raise UserError(
                f"{place}: is of {found.time.isoformat()}, and here it is {datetime.now(UTC).isoformat()} now; set "
                "the clock that is wrong, and if it is the publisher's, have the pointer written anew"
            )
        rollback_protection.pass_pointer(found, store.uri, channel, settings, place)
    # Below the pointer's own root, whatever address it holds: releases may have been moved or mirrored with it.
    return f"{store.uri}/{found.prefix}"


def pointer(
    store: Store, name: str, model: str, channel: str, settings: Publish | None = None
) -> records.Pointer | None:
    """Returns what a channel's pointer says; None, and a warning, where it says nothing.

    Args:
        settings: check its signature as publish.verify_key asks.
    """
    content, place = store.read(name), f"{store.uri}/{name}"
    if content is None:
        return None
    try:
        found = records.pointer(content[0], place)
        records.expect(found, model, channel, place)
        if settings is not None:
            record = records.read(records.POINTER, content[0], place)
            records.check(records.POINTER, record, settings, place, "it is passed over")
    except UserError as error:
        print(f"warning: {terminal.shown(error)}", file=sys.stderr)
        return None
    return found


def open_release(uri: str, settings: Publish) -> Release:
    """Raises UserError where there is no whole release, or what it says of itself does not go together."""
    store = reader(uri, settings)
    place = f"{store.uri}/{MANIFEST}"
    listed = manifest(manifest_of(store), place)
    files = {file.name: file.sha256 for file in listed.files}
    checksums = _piece(store, bundle.CHECKSUMS, files, place)
    lines = [line.replace(b" *", b"  ", 1) for line in checksums.splitlines()]
    if sorted(lines) != sorted(f"{s}  {n}".encode() for n, s in files.items() if n != bundle.CHECKSUMS):
        raise UserError(f"{place}: does not list the files of {bundle.CHECKSUMS}; it was changed, do not use it")
    last = store.uri.rpartition("/")[2]
    if files.get(bundle.WEIGHTS) != listed.sha256 or (
        last.startswith("sha256-") and last != f"sha256-{listed.sha256[:12]}"
    ):
        raise UserError(f"{place}: is of the adapter {listed.sha256[:12]}..., which is not the one that lies there")
    signature = store.read(SIGNATURE)
    if settings.verify_key:
        if signature is None:
            raise UserError(f"{store.uri}: is not signed, and publish.verify_key asks for it; do not use it")
        signing.check(checksums, signature[0], settings.verify_key, f"{store.uri}/{SIGNATURE}")
    model, packaged = _described(store, listed, files)
    return Release(
        store=store,
        uri=store.uri,
        model=model,
        sha256=listed.sha256,
        packaged=packaged,
        checksums=checksums,
        files=files,
        sizes={file.name: file.bytes for file in listed.files},
        signature=signature[0] if signature else None,
        yanked=yanked(store, f"{store.uri}/{YANKED}", YANKED, model, listed.sha256, settings),
    )


def _described(store: Store, listed: Manifest, files: dict[str, str]) -> tuple[str, str | None]:
    """Returns the model and the time of packaging, which provenance.json says: SHA256SUMS and its signature cover it.

    Raises:
        UserError: the manifest or the address names another model.
    """
    place = f"{store.uri}/{bundle.PROVENANCE}"
    try:
        facts = parse_json(_piece(store, bundle.PROVENANCE, files, f"{store.uri}/{MANIFEST}"))
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None
    facts = as_object(facts, place)
    model, packaged = facts.get("model"), facts.get("packaged")
    if not isinstance(model, str) or facts.get("sha256") != listed.sha256:
        raise UserError(f"{place}: expected the model, and sha256 {listed.sha256[:12]}...; do not use this release")
    root, name = split(store.uri)
    lies_below = name.partition("/")[0] if name.partition("/")[2].startswith("sha256-") and root else model
    for claim, who in ((listed.model, f"{MANIFEST} says"), (lies_below, "it lies below")):
        if claim != model:
            shown = f"{terminal.shown(model)}, and {who} {terminal.shown(claim)}"
            raise UserError(f"{place}: is a release of {shown}; it was changed or moved, do not use it")
    if packaged is not None:
        records.moment(packaged, f"{place}: packaged")
    return model, packaged


def _piece(store: Store, name: str, files: dict[str, str], manifest: str) -> bytes:
    """Returns a small file of a release, which is the one that the manifest lists."""
    if name not in files:
        raise UserError(f"{manifest}: does not list {name}, so this is no adapter's release")
    found = store.read(name)
    if found is None:
        raise UserError(f"{store.uri}/{name}: is missing; {store.uri} is damaged, do not use it")
    if (got := hashlib.sha256(found[0]).hexdigest()) != files[name]:
        raise UserError(differs(f"{store.uri}/{name}", files[name], got))
    return found[0]


def reader(uri: str, settings: Publish) -> Store:
    return open_store(settings.model_copy(update={"to": uri}), key=uri, consequence="ask again later")


def manifest_of(store: Store) -> bytes:
    found = store.read(MANIFEST)
    if found is None:
        raise UserError(
            f"{store.uri}: holds no {MANIFEST}, so no release; expected MODEL@CHANNEL, MODEL/sha256-..., "
            "s3://bucket/.../MODEL/sha256-... or a folder like that"
        )
    return found[0]


def split(uri: str) -> tuple[str, str]:
    """Returns the address of the store and MODEL/sha256-<12>."""
    rest, _, last = uri.rpartition("/")
    root, _, model = rest.rpartition("/")
    return root, f"{model}/{last}"


def yanked(store: Store, place: str, name: str, model: str, sha256: str, settings: Publish) -> dict[str, str] | None:
    """Returns reason, who and time of a yank, of the record in the store or of one that was seen before it went.

    A record that is not signed as publish.verify_key asks is a yank all the same: what it forbids stays forbidden until
    somebody has looked. `unproven` then says what is wrong with it.
    """
    content = store.read(name)
    found = None
    if content is not None:
        record = records.read(records.YANK, content[0], place)
        found = {key: terminal.shown(record[key]) for key in ("reason", "who", "time")}
        try:
            if any(record.get(key, claim) != claim for key, claim in (("model", model), ("sha256", sha256))):
                raise UserError(f"{place}: is the record of another release")
            remedy = "yank it again where publish.signing_key is set, for the same reason"
            records.check(records.YANK, record, settings, place, remedy)
        except UserError as error:
            return found | {"unproven": str(error)}
    return (
        rollback_protection.pass_yank(found, store_of(store), model, sha256, settings) if settings.verify_key else found
    )


def refuse_yanked(yanked: dict[str, str] | None, uri: str, instead: str) -> None:
    if yanked is not None:
        unproven = f" ({yanked['unproven']})" if "unproven" in yanked else ""
        raise UserError(
            f"{uri}: was yanked by {yanked['who']} on {yanked['time']}: {yanked['reason']}{unproven}; {instead}"
        )


def manifest(content: bytes, place: str) -> Manifest:
    """Returns what a manifest.json says. Raises UserError where it is none, or names what no release has."""
    try:
        value = as_object(parse_json(content), place)
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None
    model, sha256, files = value.get("model"), value.get("sha256"), value.get("files")
    if not records.is_name(model) or not records.is_digest(sha256) or not isinstance(files, list):
        raise UserError(f"{place}: expected a JSON object with model, sha256 and files")
    if len(files) > _MOST_FILES:
        raise UserError(f"{place}: lists {len(files)} files, expected {_MOST_FILES} at most")
    listed = []
    for number, file in enumerate(files, 1):
        name, size, digest = (
            (file.get(k) for k in ("name", "bytes", "sha256")) if isinstance(file, dict) else (None,) * 3
        )
        if not isinstance(name, str) or type(size) is not int or size < 0 or not records.is_digest(digest):
            raise UserError(f"{place}: file {number}: expected name, bytes and sha256")
        if fault := bundle.fault_of_name(name):
            raise UserError(f"{place}: {terminal.shown(repr(name))} {fault}")
        listed.append(File(name, size, str(digest)))
    # A file system may take `README.md` and `readme.md` for one file.
    folded = Counter(file.name.casefold() for file in listed)
    if twice := next((name for name, count in folded.items() if count > 1), None):
        raise UserError(f"{place}: lists {terminal.shown(twice)} more than once")
    if (total := sum(file.bytes for file in listed)) > _MOST_BYTES:
        raise UserError(f"{place}: lists {total} bytes, expected {_MOST_BYTES} at most")
    return Manifest(str(model), str(sha256), tuple(listed))


def store_of(store: Store) -> str:
    """Returns the address of the store in which a release's own prefix lies, or of the store itself."""
    last = store.uri.rpartition("/")[2]
    return split(store.uri)[0] if last.startswith("sha256-") else store.uri


def prefix_of(model: str, sha256: str) -> str:
    return f"{model}/sha256-{sha256[:12]}"


def differs(place: str, expected: str, got: str) -> str:
    return f"{place}: expected sha256 {expected[:12]}..., got {got[:12]}...; it was changed in the store, do not use it"
