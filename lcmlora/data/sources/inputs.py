"""The files of `data.path` for sources that read tables, tar files or lists: which are read, refused or unused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from lcmlora.data import rejection_advice
from lcmlora.data.preparation.shards import InputShard
from lcmlora.data.reading.candidates import Rejection, printable
from lcmlora.data.reading.folder_listing import FolderListing, LinkRule, list_folder
from lcmlora.data.rejection_advice import ByReason
from lcmlora.data.sources import split_names
from lcmlora.data.unused_files import HIDDEN_FILE, REPEATED_FOLDER, UnusedFiles
from lcmlora.errors import UserError
from lcmlora.io.remote import Files


class InputFiles(Files):
    """The files below a path of this machine or of a bucket, from which a source takes those with its endings.

    Attributes:
        left_out: files of splits that are not wanted, by split; known after `list`.
    """

    def __init__(self, path: str, links: str = "project", wanted: Sequence[str] = (split_names.TRAIN,)) -> None:
        """Raises as `Files` does.

        Args:
            links: where links may lead, as `data.links` has it.
            wanted: the splits, as `data.split` has them.
        """
        super().__init__(path)
        self._rule = links
        self._wanted = wanted
        self._listing: FolderListing | None = None
        self._endings: tuple[str, ...] = ()
        self._listed: set[str] = set()
        self.left_out: dict[str, list[str]] = {}

    @property
    def listing(self) -> FolderListing:
        """The files below the path; listed once. Raises as `list` does."""
        if self._listing is None:
            if self.local:
                self._listing = list_folder(LinkRule(Path(self.root), self._rule))
            else:
                self._listing = FolderListing(names=list(self.sizes()))
        return self._listing

    def shards(self, names: Iterable[str]) -> Iterator[InputShard]:
        """Yields each of these files as a shard; its content is the name."""
        states = {} if self.local else self.states()
        for name in names:
            yield InputShard(printable(name), self._local_state(name) if self.local else states[name], name)

    def _local_state(self, name: str) -> str:
        try:
            status = Path(self.root, name).stat()
        except OSError:  # whoever reads it gives the reason
            return ""
        return f"{status.st_size} {status.st_mtime_ns}"

    def rejections(self) -> list[Rejection]:
        """Returns the files with the source's endings, and the folders, that must not or cannot be read."""
        if self.only:
            return []
        refused = self.listing.refused.items()
        return [Rejection(printable(n), why) for n, why in refused if n.endswith("/") or _has_ending(n, self._endings)]

    def unused_files(self) -> UnusedFiles:
        """Returns the files without the source's endings."""
        unused = UnusedFiles()
        if not self.only:
            count_unused(unused, self.listing, self._listed | {rejection.name for rejection in self.rejections()})
        return unused

    def list(self, *endings: str) -> list[str]:
        """Returns the sorted names of the files below the path with these endings, in any case of letters, and in the
        wanted splits. If the path is a file, returns its own name.

        Raises:
            UserError: there is no such path, all files are of splits that are not wanted, or all of them are refused.
            Unavailable: it cannot be reached.
        """
        if self.only or (self.local and not Path(self.root).is_dir()):
            return super().list(*endings)
        self._endings = endings
        names = [name for name in self.listing.names if _has_ending(name, endings)]
        refused = [rejection for rejection in self.rejections() if not rejection.name.endswith("/")]
        if refused and not names:
            raise UserError(f"data.path: {self.path}: {rejection_advice.summary(ByReason(refused), {})}")
        names, self.left_out = split_names.choose(self.path, names, self._wanted, container=True)
        self._listed = {*names, *(name for left in self.left_out.values() for name in left)}
        return names


def count_unused(unused: UnusedFiles, listing: FolderListing, used: set[str]) -> None:
    """Adds to `unused` all listed files except those that are used or rejected."""
    unused.add(name for name in listing.names if name not in used)
    unused.add(name for name in listing.refused if not name.endswith("/") and name not in used)
    unused.add(listing.hidden, HIDDEN_FILE)
    unused.add(listing.repeated, REPEATED_FOLDER)


def _has_ending(name: str, endings: Sequence[str]) -> bool:
    return PurePosixPath(name).suffix.lower() in endings
