"""Lookups without the registry: what a version was when this user downloaded it.

With LCMLORA_OFFLINE=1 no server is asked. A version that was downloaded is then found under every name that it was
looked up by, and an alias names the version that it named at that time. Without the variable the registry is always
asked: it alone knows whether an alias has moved.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lcmlora import masking
from lcmlora.config import Registry
from lcmlora.errors import NotFound
from lcmlora.io.files import write_json
from lcmlora.io.parsing import JsonObject, as_object, read_json

VARIABLE = "LCMLORA_OFFLINE"
_FOLDER = "versions"  # in the folder of downloaded adapters


def is_asked_for() -> bool:
    """Returns whether LCMLORA_OFFLINE is set, to anything but 0 and the empty text."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def remember(cache: Path, settings: Registry, names: Iterable[str], version: JsonObject) -> None:
    """Keeps the facts of a version that was downloaded to `cache`, under these names.

    A name that is kept already for this version is left alone, so that a cache in an image can be read-only.

    Raises:
        OSError: the cache cannot be written.
    """
    for name in names:
        file = _file(cache, settings, name)
        kept = _kept(file) if file.is_file() else {}
        if any(kept.get(key) != version[key] for key in ("name", "version", "sha256")):
            write_json(file, {"name": name, "version": version})


def recall(cache: Path, settings: Registry, name: str) -> JsonObject:
    """Returns the facts of the version that had this name, or whose SHA-256 begins so, when it was downloaded.

    Raises:
        NotFound: nothing was downloaded under this name.
    """
    place = masking.address(settings.tracking_uri)
    files = [_file(cache, settings, name)]
    if len(name) < 64 and name.isalnum():  # digits of a SHA-256
        files += sorted(files[0].parent.glob(f"{name}*.json"))
    for file in files:
        if file.is_file():
            return _kept(file)
    raise NotFound(f"{name}: was never downloaded from {place}, which {VARIABLE} keeps from being asked")


def _kept(file: Path) -> JsonObject:
    return as_object(as_object(read_json(file), str(file)).get("version"), f"{file}: version")


def _file(cache: Path, settings: Registry, name: str) -> Path:
    """Returns the file for a name: one folder for each registry, since names of two of them may be the same."""
    registry = hashlib.sha256(masking.address(settings.tracking_uri).encode()).hexdigest()[:12]
    is_digest = len(name) == 64 and name.isalnum()
    return cache / _FOLDER / registry / f"{name if is_digest else hashlib.sha256(name.encode()).hexdigest()[:20]}.json"
