"""What lies in a folder of this machine, and which links in it are followed.

A link may lead anywhere within its own data folder. What it may reach besides is said by `data.links`, and is the same
for pictures, tables and tar files. Caches that tools fill with the files of a folder, and link to, always count as
part of it: DVC's or git-annex's of the repository that the folder lies in, and the blobs of the hub's snapshot that it
is. The project is the nearest folder above the data that has a params.yaml: one that comes with a data set only makes
narrower what its links may reach.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lcmlora.data.reading.candidates import LINKED, MISSING, NO_FILE, UNREADABLE
from lcmlora.project import PARAMS

_BLOB = re.compile(r"(?:files/md5/)?[0-9a-f]{2}/[0-9a-f]{30}")  # of DVC's cache, as versions 3 and 2 lay it out
_ANNEX = Path(".git", "annex", "objects")
_SNAPSHOT = re.compile(r"(?P<hub>.*/(?:datasets|models|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?")


class Links:
    """Where links of a folder may lead: refuse, project or follow, as `data.links` has them."""

    def __init__(self, root: Path, rule: str) -> None:
        self.root = root.resolve()
        self._rule = rule
        self._whole = [self.root, *_hub_blobs(self.root)]
        self._whole += [p / _ANNEX for p in self.root.parents if (p / _ANNEX).is_dir()][:1]
        # A repository may come with a data set. Of a cache outside of it only what has a blob's name is taken.
        self._blobs: list[Path] = []
        if repository := next((p for p in self.root.parents if (p / ".dvc").is_dir()), None):
            for cache in _dvc_caches(repository):
                (self._whole if cache.is_relative_to(repository) else self._blobs).append(cache)
        above = (self.root, *self.root.parents)
        self._project = next((folder for folder in above if (folder / PARAMS).is_file()), None)

    def allow(self, path: str | Path) -> bool:
        """Whether what this path is, with all links in it followed, may be read."""
        real = Path(os.path.realpath(path))
        if self._rule == "follow" or any(real.is_relative_to(folder) for folder in self._whole):
            return True
        if any(_BLOB.fullmatch(_below(real, cache)) for cache in self._blobs):
            return True
        if self._rule == "project" and self._project and real.is_relative_to(self._project):
            return not any(part.startswith(".") for part in real.relative_to(self._project).parts)
        return False


@dataclass
class Tree:
    """The files below a folder, by their paths below it.

    names: files that may be read.
    refused: other files and links to folders (their names end in /), with the reason.
    repeated: links to folders that are read under another name.
    hidden: names that begin with a dot, which are not looked at.
    """

    names: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)


def walk(links: Links) -> Tree:
    """Returns what lies below the folder whose links these are. A folder is looked into once, however many lead to it.

    What lies there in truth comes before what a link leads to.
    """
    tree = Tree()
    seen: set[tuple[int, int]] = set()
    folders, linked = [""], list[str]()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        path = links.root / folder
        try:
            told = path.stat()
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            tree.refused[f"{folder}/"] = UNREADABLE
            continue
        if (told.st_dev, told.st_ino) in seen:
            tree.repeated.append(f"{folder}/")
            continue
        seen.add((told.st_dev, told.st_ino))
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                tree.hidden.append(name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif entry.is_file(follow_symlinks=False):
                tree.names.append(name)
            elif not entry.is_symlink():
                tree.refused[name] = NO_FILE
            elif reason := _refusal(entry, links):
                tree.refused[f"{name}/" if _is_folder(entry) else name] = reason
            elif _is_folder(entry):
                linked.append(name)
            else:
                tree.names.append(name)
    tree.names.sort()
    return tree


def _refusal(entry: os.DirEntry[str], links: Links) -> str:
    """Returns why this link is not followed; nothing where it is."""
    if not links.allow(entry.path):
        return LINKED
    try:
        found = entry.is_dir() or entry.is_file()
        return "" if found else NO_FILE if Path(entry.path).exists() else MISSING
    except OSError:  # it leads to itself
        return MISSING


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""


def _hub_blobs(root: Path) -> Iterator[Path]:
    if found := _SNAPSHOT.fullmatch(root.as_posix()):
        yield Path(found["hub"], "blobs").resolve()


def _dvc_caches(repository: Path) -> Iterator[Path]:
    """Yields where DVC keeps a repository's files: by default, and by the settings of it, the user and the machine."""
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
