"""The file that a name in metadata means, which another system or program may have written in another way."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import PurePosixPath
from urllib.parse import unquote

from lcmlora.data.reading.candidates import AMBIGUOUS, MISSING, OUTSIDE, Unusable, printable

_NEAREST = 200  # missing names for which the nearest is looked for, and names among which
_DRIVE = re.compile(r"[a-zA-Z]:(?=[\\/])")


class Names:
    """The names of the files below a folder.

    A name that is there counts as it is written. For any other, files count that differ from it in upper case, in how
    accents are encoded, in slashes, in %20 and the like, or in spaces and quotes around it: one such file is meant,
    several are none.
    """

    def __init__(self, names: Iterable[str], root: str = "") -> None:
        """
        Args:
            names: paths below the folder.
            root: the folder's own path, by which absolute names are known.
        """
        self._names = set(names)
        self._root = root
        self._by_form: dict[str, list[str]] | None = None
        self._by_stem: dict[str, list[str]] = {}
        self._looked_for = 0

    def find(self, name: str, folder: str = "") -> str:
        """Returns the path of the file that the name means, where it stands in metadata of this folder.

        Raises:
            Unusable: there is no such file, there are several, or it leads out of the folder.
        """
        outside = True
        for path in self._paths(name, folder):
            path = posixpath.normpath(path)
            if path.startswith(("../", "/")) or path in ("..", "."):
                continue
            outside = False
            found = self.alike(path)
            if len(found) > 1:
                raise Unusable(AMBIGUOUS, f"could be {' or '.join(printable(n) for n in found[:3])}")
            if found:
                return found[0]
        raise Unusable(OUTSIDE if outside else MISSING, self._nearest(name))

    def alike(self, path: str) -> list[str]:
        """Returns the file of this name, or else all of its normal form."""
        if path in self._names:
            return [path]
        if self._by_form is None:
            self._by_form = defaultdict(list)
            for name in sorted(self._names):
                self._by_form[form(name)].append(name)
        return self._by_form.get(form(path), [])

    def _paths(self, name: str, folder: str) -> Iterator[str]:
        """Yields what the name may mean as a path below the folder, the likeliest first."""
        plain = name.strip().strip("\"'")
        slashed = _DRIVE.sub("", plain.removeprefix("file://").replace("\\", "/"))
        for spelling in dict.fromkeys((name, plain, slashed, unquote(slashed))):
            yield posixpath.join(folder, spelling)
            if spelling.startswith("/") and self._root:
                yield from self._below_root(spelling)

    def _below_root(self, name: str) -> Iterator[str]:
        """Yields an absolute name's part below the folder: where it is now, or where one of its name was elsewhere."""
        parts, root = PurePosixPath(posixpath.normpath(name)).parts, PurePosixPath(self._root).parts
        if parts[: len(root)] == root:
            yield "/".join(parts[len(root) :])
            return
        for place, part in enumerate(parts[:-1]):
            if form(part) == form(root[-1]):
                yield "/".join(parts[place + 1 :])

    def _nearest(self, name: str) -> str:
        """Returns words on the file that is most like this one; none where none is."""
        self._looked_for += 1
        if self._looked_for > _NEAREST:  # each takes its time
            return ""
        if not self._by_stem:
            stems = defaultdict(list)
            for each in sorted(self._names):
                stems[form(PurePosixPath(each).stem)].append(each)
            self._by_stem = dict(stems)
        wanted = form(PurePosixPath(name.replace("\\", "/")).stem)[:255]
        near = self._by_stem.get(wanted)
        if not near:
            alike = [stem for stem in self._by_stem if stem[:1] == wanted[:1] and abs(len(stem) - len(wanted)) < 4]
            found = get_close_matches(wanted, alike[:_NEAREST], n=1, cutoff=0.75)
            near = self._by_stem[found[0]] if found else []
        return f"the nearest is {printable(near[0])}" if near else ""


def form(name: str) -> str:
    """Returns what two names have in common that a person, or another system, takes for one."""
    plain = unquote(name, errors="surrogateescape") if "%" in name else name
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", plain).casefold()).replace("\\", "/")
