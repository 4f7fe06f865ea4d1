"""Finding a published release by its name or address, and checking that its parts fit before anything is used."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from lcmlora.config import Publish
from lcmlora.errors import NotFound, UserError
from lcmlora.extras import MissingExtra
from lcmlora.io import terminal
from lcmlora.io.parsing import Malformed, as_object, parse_json
from lcmlora.releases import bundle
from lcmlora.releases.stores.store import Store, open_store
from lcmlora.releases.trust import records, replay_protection, signing
from lcmlora.releases.trust.records import Yank
from lcmlora.releases.trust.signing import SIGNATURE

MANIFEST = "manifest.json"
YANKED = "yanked.json"

# Limits of a release. It has some ten files; the adapters of the largest bases have a gigabyte or two.
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
    """The content of a manifest.json. It is not signed: SHA256SUMS and provenance.json must agree with it."""

    model: str
    sha256: str
    files: tuple[File, ...]
    adapter: str | None  # SHA-256 of the weights as they were trained; None where they are those of the release


@dataclass(frozen=True)
class Release:
    """A whole release. Its manifest, SHA256SUMS, provenance and address agree, and it is signed as verify_key asks."""

    store: Store  # of its own prefix
    uri: str
    model: str
    sha256: str
    packaged: str | None  # time, by its provenance; None: packaged before this was recorded
    checksums: bytes
    files: dict[str, str]  # name -> SHA-256, SHA256SUMS included
    sizes: dict[str, int]  # name -> bytes
    signature: bytes | None
    yanked: Yank | None


_CHANNEL = re.compile(r"([^/@]+)@([^/@]+)")
_DIGITS = re.compile(r"([^/@]+)/sha256-([0-9a-f]+)")


def is_name(reference: str) -> bool:
    """Returns whether a reference is a name below `publish.to`, rather than an address or a path."""
    return bool(_CHANNEL.fullmatch(reference) or _DIGITS.fullmatch(reference))


def locate(reference: str, settings: Publish, key: str) -> str:
    """Returns the address of the release that a reference names. The release itself may be missing.

    Args:
        reference: MODEL@CHANNEL, MODEL/sha256-DIGITS, or the address or path of a release or of a channel's pointer.
        key: the setting or option that names the store, for messages.

    Raises:
        UserError: a channel's pointer is missing, is another's, is not signed as publish.verify_key asks, or is older
            than one that was seen before; or the store cannot be reached.
    """
    if match := _CHANNEL.fullmatch(reference):
        _expect_names(reference, *match.groups())
        store = open_store(settings.of(match[1]), key=key, consequence="ask again later")
        return _follow(store, match[1], match[2], settings)
    if match := _DIGITS.fullmatch(reference):
        _expect_names(reference, match[1])
        store = open_store(settings.of(match[1]), key=key, consequence="ask again later")
        return _complete_digits(match[1], match[2], store)
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
                f"{terminal.shown(reference)}: {terminal.shown(repr(name))} is not the name of a model or channel; "
                "expected letters, digits, '.', '_' and '-', 64 at most"
            )


def _complete_digits(model: str, digits: str, store: Store) -> str:
    """Returns the address of the only release of the model whose weights' SHA-256 begins with these digits.

    If there is none, they may be those of the adapter as it was trained.
    """
    entries = store.entries(f"{model}/sha256-{digits[:12]}")
    prefixes = [entry.name.rpartition("/")[0] for entry in entries if entry.name.endswith(f"/{MANIFEST}")]
    if len(prefixes) > 1:
        raise UserError(f"{model}/sha256-{digits}: is the beginning of {', '.join(prefixes)}; give more digits")
    for prefix in prefixes:
        found = store.read(f"{prefix}/{MANIFEST}")
        if found and parse_manifest(found[0], f"{store.uri}/{prefix}/{MANIFEST}").sha256.startswith(digits):
            return f"{store.uri}/{prefix}"
    return _of_trained(model, digits, store)


def _of_trained(model: str, digits: str, store: Store) -> str:
    """Returns the address of the only release of the adapter whose SHA-256, as trained, begins with these digits."""
    entries = store.entries(f"{model}/sha256-")
    prefixes = []
    for prefix in sorted(entry.name.rpartition("/")[0] for entry in entries if entry.name.endswith(f"/{MANIFEST}")):
        content = store.read(f"{prefix}/{MANIFEST}")
        listed = parse_manifest(content[0], f"{store.uri}/{prefix}/{MANIFEST}") if content else None
        if listed and listed.adapter and listed.adapter.startswith(digits):
            prefixes.append(prefix)
    if len(prefixes) > 1:
        raise UserError(f"{model}/sha256-{digits}: is the adapter of {', '.join(prefixes)}; name one of these")
    if not prefixes:
        raise NotFound(f"{model}/sha256-{digits}: no such release at {store.uri}; see `lcmlora releases list`")
    return f"{store.uri}/{prefixes[0]}"


def has_digits(store: Store, prefix: str, digits: str) -> bool:
    """Returns whether the SHA-256 of a release's adapter, as released or as trained, begins with these digits."""
    content = store.read(f"{prefix}/{MANIFEST}")
    listed = parse_manifest(content[0], f"{store.uri}/{prefix}/{MANIFEST}") if content else None
    return listed is not None and any(each and each.startswith(digits) for each in (listed.sha256, listed.adapter))


def _follow(store: Store, model: str, channel: str, settings: Publish) -> str:
    """Returns the address of the release that a channel points to."""
    name = f"{model}/channels/{channel}.json"
    place = f"{store.uri}/{name}"
    content = store.read(name)
    if content is None:
        raise NotFound(f"{place}: no such pointer")
    record = records.read_record(records.POINTER, content[0], place)
    pointer = records.pointer_of(record, place)
    records.check_channel(pointer, model, channel, place)
    if settings.verify_key:
        remedy = (
            f"run `lcmlora registry promote lcm-lora-{model}@{channel}` where publish.signing_key is set, which writes "
            "it again"
        )
        records.check_signature(record, settings, place, remedy)
        if pointer.channel is None or pointer.time is None:
            raise UserError(f"{place}: expected a channel and a time in a signed pointer; {remedy}")
        if records.is_future(pointer.time):
            raise UserError(
                f"{place}: is of {pointer.time.isoformat()}, and here it is {datetime.now(UTC).isoformat()} now; set "
                "the clock that is wrong, and if it is the publisher's, let it write the pointer again"
            )
        replay_protection.accept_pointer(pointer, store.uri, channel, settings, place)
    # The release lies in the pointer's own store, whatever address it holds: stores may be moved or mirrored.
    return f"{store.uri}/{pointer.prefix}"


def read_pointer(
    store: Store, name: str, model: str, channel: str, settings: Publish | None = None
) -> records.Pointer | None:
    """Returns a channel's pointer. Returns None where there is none, and with a warning where it cannot be used.

    Args:
        settings: if given, the signature is checked as publish.verify_key asks.
    """
    content, place = store.read(name), f"{store.uri}/{name}"
    if content is None:
        return None
    try:
        record = records.read_record(records.POINTER, content[0], place)
        pointer = records.pointer_of(record, place)
        records.check_channel(pointer, model, channel, place)
        if settings is not None:
            records.check_signature(record, settings, place, "it is ignored")
    except MissingExtra:  # says nothing about the pointer
        raise
    except UserError as error:
        print(f"warning: {terminal.shown(error)}", file=sys.stderr)
        return None
    return pointer


def open_release(uri: str, settings: Publish) -> Release:
    """Returns the release at an address.

    Raises:
        UserError: there is no whole release, its parts do not agree, or it is not signed as publish.verify_key asks.
    """
    store = open_address(uri, settings)
    place = f"{store.uri}/{MANIFEST}"
    listed = parse_manifest(read_manifest(store), place)
    files = {file.name: file.sha256 for file in listed.files}
    checksums = _small_file(store, bundle.CHECKSUMS, files, place)
    lines = [line.replace(b" *", b"  ", 1) for line in checksums.splitlines()]
    if sorted(lines) != sorted(f"{s}  {n}".encode() for n, s in files.items() if n != bundle.CHECKSUMS):
        raise UserError(f"{place}: does not list the files of {bundle.CHECKSUMS}; it was changed, do not use it")
    last = store.uri.rpartition("/")[2]
    if files.get(bundle.WEIGHTS) != listed.sha256 or (
        last.startswith("sha256-") and last != f"sha256-{listed.sha256[:12]}"
    ):
        raise UserError(f"{place}: is of the adapter {listed.sha256[:12]}..., which is not the one in this folder")
    signature = store.read(SIGNATURE)
    if settings.verify_key:
        if signature is None:
            raise UserError(f"{store.uri}: is not signed, and publish.verify_key asks for it; do not use it")
        signing.check(checksums, signature[0], settings.verify_key, f"{store.uri}/{SIGNATURE}")
    model, packaged = _model_and_time(store, listed, files)
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
        yanked=read_yank(store, f"{store.uri}/{YANKED}", YANKED, model, listed.sha256, settings),
    )


def _model_and_time(store: Store, listed: Manifest, files: dict[str, str]) -> tuple[str, str | None]:
    """Returns the model and the time of packaging from provenance.json, which SHA256SUMS and its signature cover.

    Raises:
        UserError: the manifest or the address names another model.
    """
    place = f"{store.uri}/{bundle.PROVENANCE}"
    try:
        facts = parse_json(_small_file(store, bundle.PROVENANCE, files, f"{store.uri}/{MANIFEST}"))
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None
    facts = as_object(facts, place)
    model, packaged = facts.get("model"), facts.get("packaged")
    if not isinstance(model, str) or facts.get("sha256") != listed.sha256:
        raise UserError(f"{place}: expected the model, and sha256 {listed.sha256[:12]}...; do not use this release")
    if listed.adapter is not None and facts.get("adapter") != listed.adapter:
        raise UserError(
            f"{place}: expected the adapter {listed.adapter[:12]}... of {MANIFEST}; do not use this release"
        )
    root, name = split_address(store.uri)
    containing_model = name.partition("/")[0] if name.partition("/")[2].startswith("sha256-") and root else model
    for claim, who in ((listed.model, f"{MANIFEST} says"), (containing_model, "its folder is that of")):
        if claim != model:
            shown = f"{terminal.shown(model)}, and {who} {terminal.shown(claim)}"
            raise UserError(f"{place}: is a release of {shown}; it was changed or moved, do not use it")
    if packaged is not None:
        records.parse_time(packaged, f"{place}: packaged")
    return model, packaged


def _small_file(store: Store, name: str, files: dict[str, str], manifest: str) -> bytes:
    """Returns the content of a small file of a release, checked against the SHA-256 in the manifest."""
    if name not in files:
        raise UserError(f"{manifest}: does not list {name}, so this is not the release of an adapter")
    found = store.read(name)
    if found is None:
        raise UserError(f"{store.uri}/{name}: is missing; {store.uri} is damaged, do not use it")
    if (got := hashlib.sha256(found[0]).hexdigest()) != files[name]:
        raise UserError(mismatch(f"{store.uri}/{name}", files[name], got))
    return found[0]


def open_address(uri: str, settings: Publish) -> Store:
    """Returns the folder of a release as a store of its own."""
    return open_store(settings.model_copy(update={"to": uri}), key=uri, consequence="ask again later")


def read_manifest(store: Store) -> bytes:
    """Returns the bytes of a release's manifest. Raises UserError where there is none, so no release."""
    found = store.read(MANIFEST)
    if found is None:
        raise UserError(
            f"{store.uri}: holds no {MANIFEST}, so no release; expected MODEL@CHANNEL, MODEL/sha256-..., "
            "s3://bucket/.../MODEL/sha256-..., hf://owner/name@CHANNEL or a folder like that"
        )
    return found[0]


def split_address(uri: str) -> tuple[str, str]:
    """Returns the address of the store and MODEL/sha256-<12 digits>, which an address of a release consists of."""
    rest, _, last = uri.rpartition("/")
    root, _, model = rest.rpartition("/")
    return root, f"{model}/{last}"


def read_yank(store: Store, place: str, name: str, model: str, sha256: str, settings: Publish) -> Yank | None:
    """Returns the yank of a release: the record in the store, or one that was seen before it disappeared.

    A record that is not signed as publish.verify_key asks counts, too: the release stays forbidden until somebody has
    looked. `unproven` then says what is wrong with the record.
    """
    content = store.read(name)
    yank = None
    if content is not None:
        record = records.read_record(records.YANK, content[0], place)
        yank = Yank(*(terminal.shown(record.text(key)) for key in ("reason", "who", "time")))
        try:
            if any(record.fields.get(key, own) != own for key, own in (("model", model), ("sha256", sha256))):
                raise UserError(f"{place}: is the record of another release")
            remedy = "yank it again where publish.signing_key is set, for the same reason"
            records.check_signature(record, settings, place, remedy)
        except MissingExtra:
            raise
        except UserError as error:
            return replace(yank, unproven=str(error))
    if not settings.verify_key:
        return yank
    return replay_protection.accept_yank(yank, store_address(store), model, sha256, settings)


def refuse_yanked(yank: Yank | None, uri: str, advice: str) -> None:
    """Raises UserError where a release was yanked. `advice` says what to do instead."""
    if yank is not None:
        unproven = f" ({yank.unproven})" if yank.unproven else ""
        raise UserError(f"{uri}: was yanked by {yank.who} on {yank.time}: {yank.reason}{unproven}; {advice}")


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Returns the content of a manifest.json. Raises UserError where it does not fit a release."""
    try:
        value = as_object(parse_json(content), place)
    except Malformed as error:
        raise UserError(f"{place}: {error}") from None
    model, sha256, files, adapter = (value.get(key) for key in ("model", "sha256", "files", "adapter"))
    known = records.is_digest(sha256) and (adapter is None or records.is_digest(adapter))
    if not records.is_name(model) or not known or not isinstance(files, list):
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
    if repeated := next((name for name, count in folded.items() if count > 1), None):
        raise UserError(f"{place}: lists {terminal.shown(repeated)} more than once")
    if (total := sum(file.bytes for file in listed)) > _MOST_BYTES:
        raise UserError(f"{place}: lists {total} bytes, expected {_MOST_BYTES} at most")
    return Manifest(str(model), str(sha256), tuple(listed), None if adapter is None else str(adapter))


def store_address(store: Store) -> str:
    """Returns the address of the store that contains a release, given that store or the release's own folder."""
    last = store.uri.rpartition("/")[2]
    return split_address(store.uri)[0] if last.startswith("sha256-") else store.uri


def release_prefix(model: str, sha256: str) -> str:
    """Returns the name of a release's folder in its store."""
    return f"{model}/sha256-{sha256[:12]}"


def mismatch(place: str, expected: str, got: str) -> str:
    """Returns the message for a file whose SHA-256 is not the listed one."""
    return f"{place}: expected sha256 {expected[:12]}..., got {got[:12]}...; it was changed in the store, do not use it"
