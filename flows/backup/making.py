"""Making a backup while servers and runs go on."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lcmlora import __version__, masking
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows.backup import archive, databases, objects, sources
from lcmlora.flows.backup.archive import Content, File, Manifest, StoredObject
from lcmlora.flows.backup.sources import Source
from lcmlora.io.files import atomic_folder, sha256_file, write_json

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PASSES = 6  # until nothing changes during one


def make(root: Path, settings: Config, target: Path, name: str, store: S3Client | None) -> tuple[Path, Manifest]:
    """Makes a backup of a project in a new folder below `target`, for this user alone to read.

    What changes is copied again until nothing changes during one pass. So registry, releases and artifacts are those of
    one moment, and a version names only what the backup has.

    Args:
        root: the project's folder, absolute.
        name: the project's.
        store: the SeaweedFS of `up`; None where there is none.

    Returns:
        The backup's folder, and what it has.

    Raises:
        UserError: a database cannot be copied, or files never stop changing. There is no new backup then.
        OSError: the target cannot be written to.
    """
    now = datetime.now(UTC)
    place = target / f"{name}-{now:%Y%m%dT%H%M%SZ}"
    if place.exists():
        raise UserError(f"{place}: is there already; wait a second")
    before = os.umask(0o077)
    try:
        with atomic_folder(place) as folder:
            folder.chmod(0o700)
            copier = _Copier(root, settings, folder, store)
            copier.copy()
            manifest = Manifest(
                format=archive.FORMAT,
                project=name,
                folder=str(root),
                made=f"{now:%Y-%m-%dT%H:%M:%SZ}",
                lcmlora=__version__,
                files=copier.files,
                buckets=copier.buckets,
                others=copier.others,
                left_out=_left_out(settings),
            )
            write_json(folder / archive.MANIFEST, manifest.model_dump())
    finally:
        os.umask(before)
    return place, manifest


def _left_out(settings: Config) -> list[str]:
    found = ["the results of stages in DVC's cache: `dvc push` keeps them in the DVC remote"]
    uri = settings.registry.tracking_uri
    if "://" in uri and not uri.startswith(("sqlite:", "postgresql")):
        found.append(f"the registry at {masking.address(uri)}: its server has backups of its own")
    for to in settings.publish.stores:
        if to.startswith("s3://"):
            found.append(f"the releases at {to}: keep versions of that bucket's objects")
        elif "://" in to:
            found.append(f"the releases at {masking.address(to)}")
    return found


class _Copier:
    """Copies what has changed since the last pass, until nothing does."""

    def __init__(self, root: Path, settings: Config, folder: Path, store: S3Client | None) -> None:
        self._root, self._settings, self._folder, self._store = root, settings, folder, store
        self._versions: dict[str, Any] = {}  # of what was copied, by name, or by bucket and key
        self.files: dict[str, File] = {}
        self.buckets: dict[str, dict[str, StoredObject]] = {}
        self.others: dict[str, Content] = {}

    def copy(self) -> None:
        for _ in range(_PASSES):
            before = self._state()
            found = sources.sources(self._root, self._settings)
            self._copy_databases(found)
            self._copy_files(found)
            self._copy_objects()
            self._copy_others()
            if self._state() == before:
                self._drop_unused_objects()
                return
        raise UserError("files, releases or artifacts kept changing; there is no backup: run it again in a quiet hour")

    def _state(self) -> dict[str, Any]:
        """Returns the version of everything but databases, which change with each heartbeat of a run."""
        found: dict[str, Any] = {}
        for name, source in sources.sources(self._root, self._settings).items():
            if not source.is_database and (version := _version(source)):
                found[name] = version
        for bucket in objects.buckets(self._store) if self._store else ():
            found[f"s3://{bucket}"] = objects.versions(self._store, bucket) if self._store else {}
        return found

    def _copy_databases(self, found: Mapping[str, Source]) -> None:
        # The registry first: what its versions name exists by then, and is copied after it.
        for name, source in found.items():
            if source.is_database:
                target = self._folder / archive.FILES / name
                databases.copy_sqlite(source.path, target)
                content = Content(sha256=sha256_file(target), bytes=target.stat().st_size)
                self.files[name] = File(**content.model_dump(), kind="state", mode=0o600)

    def _copy_files(self, found: Mapping[str, Source]) -> None:
        for name in self.files.keys() - found.keys():
            (self._folder / archive.FILES / name).unlink()
            del self.files[name]
        for name, source in found.items():
            version = None if source.is_database else _version(source)
            if version is None or (name in self.files and self._versions.get(name) == version):
                continue
            try:
                with source.path.open("rb") as file:
                    content = archive.copied(file, self._folder / archive.FILES / name)
            except FileNotFoundError:  # deleted meanwhile, which the next pass sees
                continue
            mode = stat.S_IMODE(source.path.stat().st_mode)
            kind: Literal["project", "state"] = "state" if source.is_state else "project"
            self.files[name] = File(**content.model_dump(), kind=kind, mode=mode)
            self._versions[name] = version

    def _copy_objects(self) -> None:
        if self._store is None:
            return
        for bucket in objects.buckets(self._store):
            now = objects.versions(self._store, bucket)
            kept = self.buckets.setdefault(bucket, {})
            for key in kept.keys() - now.keys():
                del kept[key]
            for key, version in now.items():
                if self._versions.get(f"{bucket}/{key}") == version and key in kept:
                    continue
                if stored := objects.fetch(self._store, bucket, key, self._folder):
                    kept[key], self._versions[f"{bucket}/{key}"] = stored, version

    def _copy_others(self) -> None:
        uri = self._settings.registry.tracking_uri
        if uri.startswith("postgresql"):
            databases.dump_postgresql(uri, self._folder / archive.DUMP)
        sources.bundle(self._root, self._folder / archive.BUNDLE)
        for name in (archive.DUMP, archive.BUNDLE):
            path = self._folder / name
            if path.is_file():
                self.others[name] = Content(sha256=sha256_file(path), bytes=path.stat().st_size)

    def _drop_unused_objects(self) -> None:
        used = {each.sha256 for bucket in self.buckets.values() for each in bucket.values()}
        for path in (self._folder / archive.OBJECTS).glob("*/*"):
            if path.name not in used:
                path.unlink()


def _version(source: Source) -> tuple[int, int, int] | None:
    try:
        return source.version
    except FileNotFoundError:
        return None
