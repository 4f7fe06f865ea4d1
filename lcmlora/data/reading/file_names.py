"""Finds the file that a name in metadata means, though another system or program may have spelled it differently."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import PurePosixPath
from urllib.parse import unquote

from lcmlora.data.reading.candidates import AMBIGUOUS, MISSING, OUTSIDE, Unusable, printable

_MAX_SUGGESTIONS = 200  # missing names for which a similar one is sought; each search takes its time
MAX_COMPARED = 200  # names that are compared with a missing one
_DRIVE = re.compile(r"[a-zA-Z]:(?=[\\/])")


class FileNames:
    """The names of the files below a folder.

    A name that exists means that file. Any other name means the file that differs from it only in upper case, in the
    encoding of accents, in slashes, in %20 and the like, or in spaces and quotes around it. If several files do, it is
    ambiguous.
    """

    def __init__(self, names: Iterable[str], root: str = "") -> None:
        """
        Args:
            names: paths below the folder.
            root: the folder's absolute path, for names that are absolute paths.
        """
        self._names = set(names)
        self._root = root
        self._by_form: dict[str, list[str]] | None = None
        self._by_stem: dict[str, list[str]] = {}
        self._suggestions = 0

    def find(self, name: str, folder: str = "") -> str:
        """Returns the path of the file that a name means in metadata that lie in `folder`.

        Raises:
            Unusable: there is no such file, there are several, or the name leads out of the folder.
        """
        is_outside = True
        for path in self._possible_paths(name, folder):
            path = posixpath.normpath(path)
            if path.startswith(("../", "/")) or path in ("..", "."):
                continue
            is_outside = False
            files = self.matches(path)
            if len(files) > 1:
                raise Unusable(AMBIGUOUS, f"could be {' or '.join(printable(n) for n in files[:3])}")
            if files:
                return files[0]
        raise Unusable(OUTSIDE if is_outside else MISSING, self._suggestion(name))

    def matches(self, path: str) -> list[str]:
        """Returns the file of exactly this name; if there is none, all files of the same normal form."""
        return [path] if self.has(path) else self.of_form(normal_form(path))

    def has(self, path: str) -> bool:
        return path in self._names

    def of_form(self, form: str) -> list[str]:
        """Returns the sorted names of this normal form."""
        if self._by_form is None:
            self._by_form = defaultdict(list)
            for name in sorted(self._names):
                self._by_form[normal_form(name)].append(name)
        return self._by_form.get(form, [])

    def _possible_paths(self, name: str, folder: str) -> Iterator[str]:
        """Yields the paths below the root that the name may mean, the likeliest first."""
        plain = name.strip().strip("\"'")
        slashed = _DRIVE.sub("", plain.removeprefix("file://").replace("\\", "/"))
        for spelling in dict.fromkeys((name, plain, slashed, unquote(slashed))):
            yield posixpath.join(folder, spelling)
            if spelling.startswith("/") and self._root:
                yield from self._below_root(spelling)

    def _below_root(self, name: str) -> Iterator[str]:
        """Yields what an absolute path has below the root, or below a folder with the root's name: the data set may
        have been moved."""
        parts, root = PurePosixPath(posixpath.normpath(name)).parts, PurePosixPath(self._root).parts
        if parts[: len(root)] == root:
            yield "/".join(parts[len(root) :])
            return
        for index, part in enumerate(parts[:-1]):
            if normal_form(part) == normal_form(root[-1]):
                yield "/".join(parts[index + 1 :])

    def _suggestion(self, name: str) -> str:
        """Returns a note on the file with the most similar name; empty if no name is similar."""
        self._suggestions += 1
        if self._suggestions > _MAX_SUGGESTIONS:
            return ""
        nearest = self.nearest(stem_form(name.replace("\\", "/"))[:255])
        return f"the nearest is {printable(nearest)}" if nearest else ""

    def nearest(self, stem: str) -> str | None:
        """Returns the first name with the most similar stem, if there is one."""
        if not self._by_stem:
            stems = defaultdict(list)
            for each in sorted(self._names):
                stems[stem_form(each)].append(each)
            self._by_stem = dict(stems)
        if stem not in self._by_stem:
            similar = (each for each in self._by_stem if each[:1] == stem[:1] and abs(len(each) - len(stem)) < 4)
            found = closest(stem, list(islice(similar, MAX_COMPARED)))
            return self._by_stem[found][0] if found else None
        return self._by_stem[stem][0]


def stem(name: str) -> str:
    """Returns a path up to the last dot of its name."""
    return name[: len(name) - len(ending(name))]


def ending(name: str) -> str:
    """Returns `PurePosixPath(name).suffix`, which would take most of the time of listing a folder or a tar file."""
    dot = name.rfind(".")
    return name[dot:] if name.rfind("/") + 1 < dot < len(name) - 1 else ""


def base_name(name: str) -> str:
    """Returns the last part of a path."""
    return name[name.rfind("/") + 1 :]


def normal_form(name: str) -> str:
    """Returns a form that is equal for names which a person, or another system, takes for the same."""
    plain = unquote(name, errors="surrogateescape") if "%" in name else name
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", plain).casefold()).replace("\\", "/")


def stem_form(name: str) -> str:
    """Returns the normal form of a name without its folders and ending."""
    return normal_form(stem(base_name(name)))


def closest(stem: str, others: list[str]) -> str | None:
    """Returns the most similar of some stems, if one is similar."""
    return next(iter(get_close_matches(stem, others, n=1, cutoff=0.75)), None)
