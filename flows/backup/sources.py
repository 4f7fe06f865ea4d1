"""What a backup copies of a project: which files lie where, and which of them are databases."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lcmlora.config import Config
from lcmlora.flows.backup import archive, databases
from lcmlora.projects import record

UP = ".up"
# Of .up/: logs, what is copied in another way, and what means nothing elsewhere.
_LEFT_OUT = (
    "seaweedfs",
    "seaweedfs-log",
    "*.log",
    "*.log.?",
    ".lock",
    ".gitignore",
    "variables.json",
    "prefect/concurrency_leases",
    "*.db-wal",
    "*.db-shm",
    "*.db-journal",
    "*.part",
)
_SECRETS = (".dvc/config.local",)  # of a project, which Git ignores


@dataclass(frozen=True)
class Source:
    """A file, and its name in the backup."""

    path: Path
    name: str
    is_state: bool
    is_database: bool = False

    @property
    def version(self) -> tuple[int, int, int]:
        """What changes when the file does. A database is copied anew each time."""
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns


def sources(root: Path, settings: Config) -> dict[str, Source]:
    """Returns the files to copy, by their names in the backup: the project's own, and its state.

    State is what is in .up/, the registry and its artifacts, releases in a folder, and keys that Git ignores.
    """
    found: dict[str, Source] = {}
    for path in _project_files(root):
        _add(found, root, path, is_state=False)
    for folder in (root / UP, root / "mlruns", root / "mlartifacts", *_releases(root, settings)):
        for path in _below(folder, _LEFT_OUT if folder.name == UP else ()):
            _add(found, root, path, is_state=True)
    keys = (settings.publish.signing_key, settings.publish.verify_key)
    for path in [root / name for name in (*_SECRETS, *filter(None, keys))]:
        if path.is_file():
            _add(found, root, path, is_state=True)
    if (registry := sqlite_of(settings.registry.tracking_uri, root)) and registry.is_file():
        _add(found, root, registry, is_state=True)
    return found


def sqlite_of(uri: str, root: Path) -> Path | None:
    """Returns the file of an sqlite database's address, None of another's."""
    return root / uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None


def name_of(path: Path, root: Path) -> str:
    """Returns the name in a backup of a file in the project's folder or outside of it."""
    path = Path(os.path.normpath(root / path))  # a link stays one
    return str(path.relative_to(root) if path.is_relative_to(root) else f"{archive.OUTSIDE}{path}")


def place_of(name: str, root: Path) -> Path:
    """Returns where the file with this name in a backup belongs."""
    outside = name.removeprefix(archive.OUTSIDE)
    return Path(outside) if outside != name and outside.startswith("/") else root / name


def _add(found: dict[str, Source], root: Path, path: Path, *, is_state: bool) -> None:
    name = name_of(path, root)
    found[name] = Source(path, name, is_state, is_state and databases.is_sqlite(path))


def _releases(root: Path, settings: Config) -> list[Path]:
    # `{model}` stands for each model.
    return [root / to.partition("{model}")[0] for to in settings.publish.stores if "://" not in to]


def _below(folder: Path, left_out: Collection[str]) -> Iterator[Path]:
    """Yields the files below a folder, without links, and without what matches these patterns relative to it."""
    for parent, folders, names in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _matches(here / name, left_out))
        for name in sorted(names):
            path = Path(parent, name)
            if not _matches(here / name, left_out) and path.is_file() and not path.is_symlink():
                yield path


def _matches(path: Path, patterns: Collection[str]) -> bool:
    return any(fnmatch(str(path), pattern) for pattern in patterns)


def _project_files(root: Path) -> list[Path]:
    """Returns the files that a clone of the project has, as they are now, and those that lcmlora generates."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    generated = record.read(root).files if (root / record.PLACE).is_file() else ()
    names = ["params.yaml", "dvc.yaml", "dvc.lock", "prefect.yaml", "resolved.yaml", record.PLACE, *generated]
    names += [".dvc/config", ".dvc/.gitignore", *(listed.stdout.split("\0") if listed.returncode == 0 else ())]
    paths = [root / name for name in dict.fromkeys(names) if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def bundle(root: Path, target: Path) -> bool:
    """Writes the project's Git history to a file; returns False where the folder is no repository with a commit."""
    if not (root / ".git").exists():
        return False
    made = subprocess.run(
        ["git", "bundle", "create", "--quiet", str(target), "HEAD", "--branches", "--tags"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if made.returncode == 0:
        target.chmod(0o600)
    return made.returncode == 0
