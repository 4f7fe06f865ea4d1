"""A backup as a folder: files, objects of the store, and the list of all of them with their digests.

    MY-ADAPTERS-20261129T020000Z/
      manifest.json       what there is
      files/PATH          by the path in the project's folder, or below `outside/` by the absolute path
      objects/SHA256      objects of the store, each content once
      repository.bundle   the project's Git history
      registry.dump       a PostgreSQL database, as `pg_dump --format=custom` writes it

The folder has its final name only when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lcmlora.errors import UserError
from lcmlora.io.parsing import read_bytes
from lcmlora.io.terminal import shown

FORMAT = 1
MANIFEST = "manifest.json"
FILES, OBJECTS, BUNDLE, DUMP = "files", "objects", "repository.bundle", "registry.dump"
OUTSIDE = "outside"  # the folder for files that lie outside of the project
_BLOCK = 1 << 20
_MAX_MANIFEST = 1 << 30  # bytes; an object takes about 400


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a later version may say more


class Content(_Record):
    """Bytes."""

    sha256: str
    bytes: int


class File(Content):
    """A file of the project, or one beside it.

    kind: `state` is what nothing else holds; `project` is what a clone of the Git repository has, too.
    """

    kind: Literal["project", "state"]
    mode: int


class StoredObject(Content):
    """An object of the store, with what it is stored with."""

    headers: dict[str, str] = {}
    metadata: dict[str, str] = {}
    tags: dict[str, str] = {}


class Manifest(_Record):
    """What a backup has."""

    format: int
    project: str
    folder: str  # where the project was
    made: str  # ISO 8601, UTC
    lcmlora: str
    files: dict[str, File]  # by their names below files/
    buckets: dict[str, dict[str, StoredObject]]  # by bucket and key
    others: dict[str, Content]  # repository.bundle, registry.dump
    left_out: list[str]  # in words, with the reason


def copied(source: IO[bytes], path: Path, mode: int = 0o600) -> Content:
    """Writes the bytes of `source` to a new file, and returns their digest. Nobody else can read it by default."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "wb") as target:
        while block := source.read(_BLOCK):
            digest.update(block)
            size += len(block)
            target.write(block)
    return Content(sha256=digest.hexdigest(), bytes=size)


def object_path(backup: Path, sha256: str) -> Path:
    """Returns the path of an object's content."""
    return backup / OBJECTS / sha256[:2] / sha256


def find(source: Path) -> Path:
    """Returns the backup in a folder, the newest where it has several.

    Raises:
        UserError: there is none.
    """
    if (source / MANIFEST).is_file():
        return source
    found = sorted(source.glob(f"*/{MANIFEST}"), key=lambda path: read(path.parent).made)
    if not found:
        raise UserError(f"{source}: is no backup and has none; `lcmlora backup FOLDER` makes one")
    return found[-1].parent


def read(backup: Path) -> Manifest:
    """Returns the list of a backup. Raises UserError if it is damaged, or of a later version."""
    path = backup / MANIFEST
    try:
        found = Manifest.model_validate_json(read_bytes(path, limit=_MAX_MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; take another backup") from None
    if found.format != FORMAT:
        raise UserError(f"{path}: is of format {found.format}, and this lcmlora reads {FORMAT}; install a later one")
    for name in found.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path}: {shown(name)}: is no path within a project; take another backup")
    return found


def check(backup: Path, manifest: Manifest) -> None:
    """Raises UserError if a file is missing or has other bytes than when it was made."""
    for path, wanted in _contents(backup, manifest):
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; nothing was restored: take another backup") from None
        if found != wanted.sha256:
            raise UserError(f"{path}: is damaged; nothing was restored: take another backup")


def _contents(backup: Path, manifest: Manifest) -> Iterator[tuple[Path, Content]]:
    yield from ((backup / FILES / name, file) for name, file in manifest.files.items())
    yield from ((backup / name, content) for name, content in manifest.others.items())
    objects = {each.sha256: each for bucket in manifest.buckets.values() for each in bucket.values()}
    yield from ((object_path(backup, sha256), each) for sha256, each in objects.items())
