"""The files below a folder of this machine, and which symbolic links in it are followed.

A link may lead anywhere within its own data folder; the setting `data.links` says where else it may lead, for pictures,
tables and tar files alike. Caches that tools fill with a folder's files and link to always count as part of the folder:
the cache of DVC or git-annex in the folder's repository, and the blobs of a snapshot of the Hugging Face hub. The
project is the nearest folder at or above the data that has a params.yaml, so a params.yaml that comes with a data set
only narrows where its links may lead.
"""

from __future__ import annotations

import configparser
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from lcmlora.data.reading.candidates import LINKED, MISSING, NO_FILE, UNREADABLE
from lcmlora.project import PARAMS

_BLOB = re.compile(r"(?:files/md5/)?[0-9a-f]{2}/[0-9a-f]{30}")  # of DVC's cache, as versions 3 and 2 lay it out
_ANNEX = Path(".git", "annex", "objects")
_SNAPSHOT = re.compile(r"(?P<hub>.*/(?:datasets|models|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?")


class LinkRule:
    """Where the links of a folder may lead: refuse, project or follow, as in `data.links`."""

    def __init__(self, root: Path, rule: str) -> None:
        self.root = root.resolve()
        self._rule = rule
        self._own_folders = [self.root, *_hub_blobs(self.root)]
        self._own_folders += [p / _ANNEX for p in self.root.parents if (p / _ANNEX).is_dir()][:1]
        # A repository may come with a data set, so in a cache outside of it only files with a blob's name may be read.
        self._outer_caches: list[Path] = []
        if repository := next((p for p in self.root.parents if (p / ".dvc").is_dir()), None):
            for cache in _dvc_caches(repository):
                (self._own_folders if cache.is_relative_to(repository) else self._outer_caches).append(cache)
        at_or_above = (self.root, *self.root.parents)
        self._project = next((folder for folder in at_or_above if (folder / PARAMS).is_file()), None)

    def allows(self, path: str | Path) -> bool:
        """Returns whether the file or folder to which this path leads, over all links, may be read."""
        real = Path(os.path.realpath(path))
        if self._rule == "follow" or any(real.is_relative_to(folder) for folder in self._own_folders):
            return True
        if any(_BLOB.fullmatch(_below(real, cache)) for cache in self._outer_caches):
            return True
        if self._rule == "project" and self._project and real.is_relative_to(self._project):
            return not any(part.startswith(".") for part in real.relative_to(self._project).parts)
        return False


@dataclass
class FolderListing:
    """The files below a folder, by their paths below it.

    names: files that may be read.
    refused: files and folders that must not or cannot be read, with the reason; names of folders end in a slash.
    repeated: links to folders that are read under another name.
    hidden: files and folders whose names begin with a dot; they are not read.
    """

    names: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)


class Entry(NamedTuple):
    """A file or a folder below a folder.

    kind: the field of FolderListing that has it.
    folder: the number of the folder that has it, as folders are read one after the other.
    found: the file; None for a folder.
    """

    kind: Literal["names", "refused", "repeated", "hidden"]
    name: str
    folder: int = 0
    reason: str = ""
    found: os.DirEntry[str] | None = None


def list_folder(links: LinkRule) -> FolderListing:
    """Returns the files below the rule's folder. Each folder is read once, however many links lead to it.

    Folders that are really there are read before those that links lead to.
    """
    listing = FolderListing()
    entries = sorted(walk(links), key=lambda entry: (entry.folder, entry.name))
    listing.names = sorted(entry.name for entry in entries if entry.kind == "names")
    listing.refused = {entry.name: entry.reason for entry in entries if entry.kind == "refused"}
    listing.repeated = [entry.name for entry in entries if entry.kind == "repeated"]
    listing.hidden = [entry.name for entry in entries if entry.kind == "hidden"]
    return listing


def walk(links: LinkRule) -> Iterator[Entry]:
    """Yields what `list_folder` returns, in the order of the folders, and in no order within one."""
    seen: set[tuple[int, int]] = set()  # device and inode
    folders, linked = [""], list[str]()
    for number in itertools.count():
        if not (folders or linked):
            return
        folder = folders.pop() if folders else linked.pop(0)
        path = links.root / folder
        try:
            status = path.stat()
            entries = os.scandir(path)
        except OSError:
            yield Entry("refused", f"{folder}/", number, UNREADABLE)
            continue
        if (status.st_dev, status.st_ino) in seen:
            yield Entry("repeated", f"{folder}/", number)
            continue
        seen.add((status.st_dev, status.st_ino))
        within, linked_here = list[str](), list[str]()
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                yield Entry("hidden", name, number)
            elif entry.is_dir(follow_symlinks=False):
                within.append(name)
            elif entry.is_file(follow_symlinks=False):
                yield Entry("names", name, number, found=entry)
            elif not entry.is_symlink():
                yield Entry("refused", name, number, NO_FILE)
            elif reason := _refusal(entry, links):
                yield Entry("refused", f"{name}/" if _is_folder(entry) else name, number, reason)
            elif _is_folder(entry):
                linked_here.append(name)
            else:
                yield Entry("names", name, number, found=entry)
        folders += sorted(within)
        linked += sorted(linked_here)


def _refusal(entry: os.DirEntry[str], links: LinkRule) -> str:
    """Returns why this link is not followed; empty if it is."""
    if not links.allows(entry.path):
        return LINKED
    try:
        is_found = entry.is_dir() or entry.is_file()
        return "" if is_found else NO_FILE if Path(entry.path).exists() else MISSING
    except OSError:  # it leads to itself
        return MISSING


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _below(path: Path, folder: Path) -> str:
    """Returns the path relative to a folder; empty if it is not in the folder."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""


def _hub_blobs(root: Path) -> Iterator[Path]:
    """Yields the folder of blobs of a hub's snapshot, if the folder is one."""
    if snapshot := _SNAPSHOT.fullmatch(root.as_posix()):
        yield Path(snapshot["hub"], "blobs").resolve()


def _dvc_caches(repository: Path) -> Iterator[Path]:
    """Yields the caches of a repository: DVC's default, and those in the settings of repository, user and machine."""
    yield Path(os.path.realpath(repository / ".dvc" / "cache"))
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    own = Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or home / "dvc")
    all_users = Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR") or "/etc/xdg/dvc")
    inside = repository / ".dvc"
    for file in (inside / "config.local", inside / "config", own / "config", all_users / "config"):
        settings = configparser.ConfigParser(strict=False, interpolation=None)
        try:
            settings.read(file, encoding="utf-8")
            named = settings.get("cache", "dir", fallback="")
        except (configparser.Error, OSError, UnicodeDecodeError):  # DVC says what is wrong with its own settings
            continue
        if named and "\0" not in named:
            yield Path(os.path.realpath(file.parent / Path(named).expanduser()))
