"""The files of `data.path`, for all sources alike: which are read, and what becomes of every other one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lcmlora.data import rejection_advice
from lcmlora.data.reading.candidates import Rejection, printable
from lcmlora.data.reading.folder_listing import Links, Tree, walk
from lcmlora.data.sources import splits
from lcmlora.data.unused_files import HIDDEN_FILE, REPEATED_FOLDER, UnusedFiles
from lcmlora.errors import UserError
from lcmlora.io.remote import Files


class Inputs(Files):
    """Files of this machine or of a bucket, from which a source takes those of its endings.

    left_out: files that belong to a split which is not wanted, by split.
    """

    def __init__(self, path: str, links: str = "project", wanted: Sequence[str] = (splits.TRAIN,)) -> None:
        """Raises as `Files` does.

        Args:
            links: where links may lead, as `data.links` has it.
            wanted: the splits, as `data.split` has them.
        """
        super().__init__(path)
        self._rule = links
        self._wanted = wanted
        self._tree: Tree | None = None
        self._endings: tuple[str, ...] = ()
        self._listed: set[str] = set()
        self.left_out: dict[str, list[str]] = {}

    @property
    def tree(self) -> Tree:
        """What lies below the path; read once. Raises as `list` does."""
        if self._tree is None:
            if self.local:
                self._tree = walk(Links(Path(self.root), self._rule))
            else:
                self._tree = Tree(names=list(self.sizes()))
        return self._tree

    def rejections(self) -> list[Rejection]:
        """Returns the files that were asked for and must not or cannot be read, and folders that were not entered."""
        if self.only:
            return []
        refused = self.tree.refused.items()
        return [Rejection(printable(n), why) for n, why in refused if n.endswith("/") or _ends(n, self._endings)]

    def unused_files(self) -> UnusedFiles:
        """Returns the files that were not asked for."""
        found = UnusedFiles()
        if not self.only:
            count_unread(found, self.tree, self._listed | {rejection.name for rejection in self.rejections()})
        return found

    def list(self, *endings: str) -> list[str]:
        """Returns the names below the path that end so, in any case of letters, of the wanted splits, sorted; the
        path's own name where it is a file.

        Raises:
            UserError: there is no such path, it has splits and none is wanted, or all such files are refused.
            Unavailable: it cannot be reached.
        """
        if self.only or (self.local and not Path(self.root).is_dir()):
            return super().list(*endings)
        self._endings = endings
        names = [name for name in self.tree.names if _ends(name, endings)]
        refused = [rejection for rejection in self.rejections() if not rejection.name.endswith("/")]
        if refused and not names:
            raise UserError(f"data.path: {self.path}: {rejection_advice.summary(refused, {})}")
        names, self.left_out = splits.choose(self.path, names, self._wanted, container=True)
        self._listed = {*names, *(name for left in self.left_out.values() for name in left)}
        return names


def count_unread(unused: UnusedFiles, tree: Tree, read: set[str]) -> None:
    """Adds all files of the tree except those that are read or rejected."""
    unused.add(name for name in tree.names if name not in read)
    unused.add(name for name in tree.refused if not name.endswith("/") and name not in read)
    unused.add(tree.hidden, HIDDEN_FILE)
    unused.add(tree.repeated, REPEATED_FOLDER)


def _ends(name: str, endings: Sequence[str]) -> bool:
    return PurePosixPath(name).suffix.lower() in endings
