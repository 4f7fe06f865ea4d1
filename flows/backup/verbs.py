"""`lcmlora backup` and `lcmlora restore`. Heavy imports happen inside the verbs.

`python -m lcmlora.flows.backup.verbs backup FOLDER` does the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora import extras
from lcmlora.cli.context import context_of
from lcmlora.errors import UserError
from lcmlora.flows.verbs import enter, standalone
from lcmlora.io.terminal import note, say

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from lcmlora.flows.backup.archive import Manifest


def backup(
    call: typer.Context,
    target: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Gets a new folder with the backup.", show_default=False)
    ],
) -> None:
    """Copy what Git and DVC do not hold into a new folder: registry, runs, releases, artifacts, passwords.

    The servers of `up`, and runs, go on meanwhile. A backup that was interrupted is none. It has the passwords and keys
    of the project without encryption, for you alone to read (mode 700): keep it where nobody else can.

    Example: lcmlora backup /mnt/backups
    """
    target = target.absolute()  # before the project's folder becomes the current one
    project = enter(call)
    from lcmlora.flows import stack
    from lcmlora.flows.backup import making
    from lcmlora.flows.servers import environment

    root = Path.cwd()
    up = root / ".up"
    with contextlib.ExitStack() as stays:
        if up.is_dir():
            stays.enter_context(stack.locked_folder(up))
            environment.forget_sourced(os.environ, up, stack.read_state(up).exported)
        settings = project.settings()
        store = stays.enter_context(_client(up)) if (up / "seaweedfs").is_dir() else None
        place, manifest = making.make(root, settings, target, _name(root), store)
    _show(place, manifest)


def restore(
    call: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A backup, or a folder with several: the newest.", show_default=False),
    ],
) -> None:
    """Bring a project back from a backup, into an empty folder or a fresh clone of the project.

    Every file is held against its digest before anything is written, and nothing that is there is overwritten. Then
    `lcmlora up` starts the servers with the registry, the runs, the releases and the passwords of the backup.

    Examples:

      mkdir my-adapters && cd my-adapters && lcmlora restore /mnt/backups

      lcmlora --project my-adapters restore /mnt/backups/my-adapters-20261129T020000Z
    """
    extras.require(extra="pipeline", needed_by=call.command_path)
    source = source.absolute()
    root = context_of(call).project.root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    from lcmlora.flows import background, services, stack
    from lcmlora.flows.backup import archive, restoring
    from lcmlora.flows.servers import environment

    place = archive.find(source)
    manifest = archive.read(place)
    restoring.require_folder(root)
    restoring.require_tools(manifest, services.weed() is not None)
    up = root / ".up"
    environment.forget_sourced(os.environ, up, {})
    note(f"checking {place} ...")
    archive.check(place, manifest)
    with stack.locked_folder(up):
        if background.family(*(up / name for name in (*stack.PORTS, "worker"))):
            raise UserError(f"{up}: its servers work; `lcmlora down` ends them")
        restoring.restore(place, manifest, root, lambda: _client(up))
    say(f"restored {len(manifest.files)} files and {_objects(manifest)} objects of {manifest.made}")
    for line in manifest.left_out:
        note(f"it has not: {line}")
    say("lcmlora up      # starts the servers with it")


@contextlib.contextmanager
def _client(up: Path) -> Iterator[S3Client]:
    from lcmlora.flows import stack

    with stack.store(up) as s3:
        yield s3.client(patient=True)


def _name(root: Path) -> str:
    from lcmlora.projects import record

    name = record.read(root).options.name if (root / record.PLACE).is_file() else root.name
    return "".join(each if each.isalnum() or each in "._-" else "-" for each in name)


def _objects(manifest: Manifest) -> int:
    return sum(map(len, manifest.buckets.values()))


def _show(place: Path, manifest: Manifest) -> None:
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    say(place)
    note(
        f"{len(manifest.files)} files and {_objects(manifest)} objects in {size / 1e6:.1f} MB, every one with a digest"
    )
    for line in manifest.left_out:
        note(f"it has not: {line}")
    note("it has passwords and keys without encryption, for you alone to read: keep it where nobody else can")


if __name__ == "__main__":
    standalone("lcmlora.flows.backup.verbs", backup, restore)
