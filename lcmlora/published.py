"""How a published release is found by what it is named, and what must go together in it before anything is used."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcmlora import release, signing
from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.signing import SIGNATURE
from lcmlora.stores import Store, open_store

MANIFEST = "manifest.json"
YANKED = "yanked.json"
ADAPTER = (release.WEIGHTS, release.SCHEDULER, release.PROVENANCE)  # what drawing needs


@dataclass(frozen=True)
class Release:
    """A whole release whose manifest, SHA256SUMS and address say the same, signed as publish.verify_key asks."""

    store: Store  # of its own prefix
    uri: str
    model: str
    sha256: str
    checksums: bytes
    files: dict[str, str]  # name -> SHA-256, SHA256SUMS included
    signature: bytes | None
    yanked: dict[str, str] | None


_CHANNEL = re.compile(r"([^/@]+)@([^/@]+)")
_DIGITS = re.compile(r"([^/@]+)/sha256-([0-9a-f]+)")


def is_name(reference: str) -> bool:
    """Returns whether it is a name below `publish.to`, and not an address or a path."""
    return bool(_CHANNEL.fullmatch(reference) or _DIGITS.fullmatch(reference))


def locate(reference: str, settings: Publish, key: str) -> str:
    """Returns the address of the release that is asked for, which may not be there."""
    if match := _CHANNEL.fullmatch(reference):
        store = open_store(settings, key=key, consequence="ask again later")
        return _follow(store, f"{match[1]}/channels/{match[2]}.json")
    if match := _DIGITS.fullmatch(reference):
        return _complete_digits(match[1], match[2], open_store(settings, key=key, consequence="ask again later"))
    address = reference.rstrip("/") if "://" in reference else Path(reference).absolute().as_uri()
    if address.endswith(".json"):
        root, name = split(address.rpartition("/")[0])
        store = open_store(settings.model_copy(update={"to": root}), key=reference, consequence="ask again later")
        return _follow(store, f"{name}/{address.rpartition('/')[2]}")
    return address


def _complete_digits(model: str, digits: str, store: Store) -> str:
    entries = store.entries(f"{model}/sha256-{digits[:12]}")
    prefixes = [entry.name.rpartition("/")[0] for entry in entries if entry.name.endswith(f"/{MANIFEST}")]
    if len(prefixes) > 1:
        raise UserError(f"{model}/sha256-{digits}: is the beginning of {', '.join(prefixes)}; give more digits")
    for prefix in prefixes:
        manifest = store.read(f"{prefix}/{MANIFEST}")
        if manifest and str(value(manifest[0], f"{store.uri}/{prefix}/{MANIFEST}", "sha256")).startswith(digits):
            return f"{store.uri}/{prefix}"
    raise UserError(f"{model}/sha256-{digits}: no such release at {store.uri}; see `lcmlora releases list`")


def _follow(store: Store, name: str) -> str:
    found = store.read(name)
    if found is None:
        raise UserError(f"{store.uri}/{name}: no such pointer")
    # Below the pointer's own root, whatever address it holds: releases may have been moved or mirrored with it.
    return f"{store.uri}/{target(found[0], f'{store.uri}/{name}')}"


def target(content: bytes, place: str) -> str:
    """Returns MODEL/sha256-<12> that a channel's pointer names."""
    model, sha256 = str(value(content, place, "model")), str(value(content, place, "sha256"))
    if not re.fullmatch(r"(?!\.\.?$)[^/]+", model) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(f"{place}: expected the model and sha256 of a release, got {model!r} and {sha256!r}")
    return prefix_of(model, sha256)


def open_release(uri: str, settings: Publish) -> Release:
    """Raises UserError where there is no whole release, or what it says of itself does not go together."""
    store = reader(uri, settings)
    manifest, place = manifest_of(store), f"{store.uri}/{MANIFEST}"
    sha256 = str(value(manifest, place, "sha256"))
    try:
        files = {str(file["name"]): str(file["sha256"]) for file in value(manifest, place, "files")}
    except (TypeError, KeyError):
        raise UserError(f"{place}: expected a list of files with name and sha256") from None
    for name in files:
        if Path(name).name != name or name == "..":
            raise UserError(f"{place}: {name!r} is not the name of a file")
    checksums = store.read(release.CHECKSUMS)
    if checksums is None:
        raise UserError(f"{store.uri}/{release.CHECKSUMS}: is missing; {store.uri} is damaged, do not use it")
    found = hashlib.sha256(checksums[0]).hexdigest()
    if found != files.get(release.CHECKSUMS):
        raise UserError(differs(f"{store.uri}/{release.CHECKSUMS}", files.get(release.CHECKSUMS, ""), found))
    lines = {line.replace(b" *", b"  ", 1) for line in checksums[0].splitlines()}
    if lines != {f"{s}  {n}".encode() for n, s in files.items() if n != release.CHECKSUMS}:
        raise UserError(f"{place}: does not list the files of {release.CHECKSUMS}; it was changed, do not use it")
    last = store.uri.rpartition("/")[2]
    if files.get(release.WEIGHTS) != sha256 or (last.startswith("sha256-") and last != f"sha256-{sha256[:12]}"):
        raise UserError(f"{place}: is of the adapter {sha256[:12]}..., which is not the one that lies there")
    signature = store.read(SIGNATURE)
    if settings.verify_key:
        if signature is None:
            raise UserError(f"{store.uri}: is not signed, and publish.verify_key asks for it; do not use it")
        signing.check(checksums[0], signature[0], settings.verify_key, f"{store.uri}/{SIGNATURE}")
    return Release(
        store=store,
        uri=store.uri,
        model=str(value(manifest, place, "model")),
        sha256=sha256,
        checksums=checksums[0],
        files=files,
        signature=signature[0] if signature else None,
        yanked=yanked(store, YANKED),
    )


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


def yanked(store: Store, name: str) -> dict[str, str] | None:
    found = store.read(name)
    if found is None:
        return None
    return {key: str(value(found[0], f"{store.uri}/{name}", key)) for key in ("reason", "who", "time")}


def refuse_yanked(yanked: dict[str, str] | None, uri: str, instead: str) -> None:
    if yanked is not None:
        raise UserError(f"{uri}: was yanked by {yanked['who']} on {yanked['time']}: {yanked['reason']}; {instead}")


def value(content: bytes, place: str, key: str) -> Any:
    try:
        return json.loads(content)[key]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place}: expected a JSON object with {key}") from None


def prefix_of(model: str, sha256: str) -> str:
    return f"{model}/sha256-{sha256[:12]}"


def differs(place: str, expected: str, got: str) -> str:
    return f"{place}: expected sha256 {expected[:12]}..., got {got[:12]}...; it was changed in the store, do not use it"
