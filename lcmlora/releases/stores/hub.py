"""A store in a repository of the Hugging Face hub. Each release and each channel is a branch, and a commit a change.

    sha256-<12 digits>   a release: its files in the top folder, so that the revision draws in diffusers as it is
    CHANNEL              the files of the release that the channel points to, and the pointer as .channel.json
    main                 the same as `champion`, for those who open the repository's page or name no revision

A commit names the commit that its branch had when it was looked at; the hub refuses it where the branch has moved.
A repository holds the releases of one model: its page is one card. HF_ENDPOINT names another hub, HF_TOKEN the user.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.io.terminal import note, shown
from lcmlora.releases.stores import hub_requests
from lcmlora.releases.stores.store import Entry, Store, expect_small

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_POINTER = ".channel.json"
_MAIN = "main"
_SHOWN = "champion"  # the channel that `main` shows
_MANIFEST = "manifest.json"
_ATTEMPTS = 8  # commits on a branch that others commit to at the same moment
_OPENNESS = ("private", "gated", "public")


@dataclass(frozen=True)
class Place:
    """Where an object lies in the repository."""

    branch: str
    file: str
    model: str | None  # None: the address names a branch, and no model

    @property
    def is_pointer(self) -> bool:
        return self.file == _POINTER


class HubStore(Store):
    """Releases in a repository of models. It is made at the first release, for `publish.access`."""

    form = "hf://owner/name"

    def __init__(self, match: re.Match[str], settings: Publish, key: str, consequence: str) -> None:
        self._repository, self._revision, prefix = match[1], match[2], match[3] or ""
        self._prefix = f"{prefix}/" if prefix else ""
        self._settings = settings
        self._ready_for: str | None = None  # the model
        self._trees: dict[str, dict[str, Any]] = {}  # by commit
        self.uri = f"hf://{match[0].removeprefix('hf://').rstrip('/')}"
        self._hub = hub_requests.Requests(f"{key}: {self._repository}", consequence)

    @classmethod
    def open(cls, settings: Publish, key: str, consequence: str) -> Self:
        name = r"[A-Za-z0-9][\w.-]{0,95}"
        match = re.fullmatch(rf"hf://({name}/{name})(?:@([\w./-]+?))?/*(?:/([^@]+?)/*)?", settings.first)
        if match is None or (match[2] and match[3]):
            raise UserError(f"{key}: expected {cls.form}, or {cls.form}@revision to read, got {settings.first!r}")
        return cls(match, settings, key, consequence)

    @classmethod
    def page(cls, address: str, name: str = "") -> str:
        from huggingface_hub.constants import ENDPOINT

        match = re.match(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/[^/]+/(sha256-[0-9a-f]{12}))?", address)
        if match is None:
            return address
        branch = quote(match[2] or match[3] or _MAIN, safe="")
        return f"{ENDPOINT}/{match[1]}/{'blob' if name else 'tree'}/{branch}" + (f"/{quote(name)}" if name else "")

    @property
    def _api(self) -> HfApi:
        return self._hub.api

    # -- what is there

    def read(self, name: str) -> tuple[bytes, str] | None:
        found = self._found(name)
        if found is None:
            return None
        head, file = found
        expect_small(file.size, f"{self.uri}/{name}")
        with tempfile.TemporaryDirectory(prefix="lcmlora-") as folder:
            return self._download(head, file.path, Path(folder)).read_bytes(), head

    def digest(self, name: str, *, reread: bool = False) -> str | None:
        found = self._found(name)
        if found is None:
            return None
        head, file = found
        if file.lfs is not None and not reread:
            return str(file.lfs.sha256)  # of the pointer, which the hub compares with the bytes
        with tempfile.TemporaryDirectory(prefix="lcmlora-") as folder:
            return sha256_file(self._download(head, file.path, Path(folder)))

    def fetch(self, name: str, target: Path, size: int) -> bool:
        found = self._found(name)
        if found is None:
            return False
        head, file = found
        if file.size != size:
            raise UserError(
                f"{self.uri}/{name}: has {file.size} bytes, and {size} are listed; it was changed in the store, do "
                "not use it"
            )
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            self._download(head, file.path, Path(folder)).replace(target)
        return True

    def entries(self, prefix: str) -> list[Entry]:
        whole = self._prefix + prefix
        if self._revision:
            found = self._listed(self._revision, "", pointer=False)
        elif match := re.match(r"([^/]+)/(sha256-[0-9a-f]{12})/", whole):
            found = self._listed(match[2], match[0], pointer=False)
        else:
            found = self._all()
        return sorted(
            (Entry(e.name.removeprefix(self._prefix), e.bytes, e.time) for e in found if e.name.startswith(whole)),
            key=lambda entry: entry.name,
        )

    def _all(self) -> list[Entry]:
        """Returns the objects of all branches, main apart, which repeats a channel."""
        branches, found, model = self._branches(), [], self._model()
        for branch in branches if model else {}:
            if re.fullmatch("sha256-[0-9a-f]{12}", branch):
                found += self._listed(branch, f"{model}/{branch}/", pointer=False)
            elif branch != _MAIN:
                found += self._listed(branch, f"{model}/channels/", pointer=True)
        return found

    def _listed(self, branch: str, folder: str, *, pointer: bool) -> list[Entry]:
        """Returns the objects of a branch: the files of a release, or the pointer of a channel alone."""
        found = []
        for path, file in self._listing(branch, expand=True).items():
            time = file.last_commit.date if file.last_commit else None
            if time is not None and pointer and path == _POINTER:
                found.append(Entry(f"{folder}{branch}.json", file.size, time))
            elif time is not None and not pointer and not path.startswith("."):
                found.append(Entry(folder + path, file.size, time))
        return found

    # -- changes

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        return bool(self.create_many({name: (content, sha256)}))

    def create_many(self, files: Mapping[str, tuple[Path | bytes, str]]) -> set[str]:
        """Writes those that are missing by one commit."""
        places = {name: self._writable(name) for name in files}
        created: set[str] = set()
        for branch in {place.branch for place in places.values()}:
            own = {places[name].file: (name, *files[name]) for name in files if places[name].branch == branch}
            created |= self._create_on(branch, own)
        return created

    def _create_on(self, branch: str, files: Mapping[str, tuple[str, Path | bytes, str]]) -> set[str]:
        for _ in range(_ATTEMPTS):
            head = self._head(branch) or self._start(branch)
            present = self._files(head)
            # A branch that was just begun has the files of the repository's first commit, which are of no release.
            foreign = {path for path in present if not path.startswith(".")} if head == self._first else set()
            missing = {file: each for file, each in files.items() if file not in present or file in foreign}
            if not missing:
                return set()
            operations = [self._addition(file, content, sha256) for file, (_, content, sha256) in missing.items()]
            operations += [hub_requests.deletion(path) for path in foreign - missing.keys()]
            if self._commit(branch, operations, head, f"Add {', '.join(sorted(missing))}"):
                return {name for name, _, _ in missing.values()}
        raise self._contended(branch)

    def delete(self, name: str) -> None:
        """Deletes an object if there is one, by a commit; with the last one of a branch, the branch. Earlier commits
        of other branches may still have its bytes."""
        place = self._writable(name)
        for _ in range(_ATTEMPTS):
            head = self._head(place.branch)
            present = self._files(head) if head else {}
            if head is None or place.file not in present:
                return
            if place.is_pointer or {path for path in present if not path.startswith(".")} == {place.file}:
                self._delete_branch(place.branch)
                return
            if self._commit(place.branch, [hub_requests.deletion(place.file)], head, f"Delete {place.file}"):
                return
        raise self._contended(place.branch)

    def _delete_branch(self, branch: str) -> None:
        def delete() -> None:
            self._api.delete_branch(self._repository, branch=branch)

        self._hub.ask(delete, {404: None}, f"branch {branch}")

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        place = self._writable(name)
        head = self._head(place.branch)
        if tag is None:
            if head is not None and place.file in self._files(head):
                return False
            head = head or self._start(place.branch)
        if head is None or (tag is not None and head != tag):
            return False
        operations = [self._addition(place.file, content, hashlib.sha256(content).hexdigest())]
        if place.is_pointer:
            sha256 = str(_fields(content).get("sha256"))
            release = self._head(f"sha256-{sha256[:12]}")
            if release is None:
                raise UserError(f"{self.uri}/{name}: there is no release sha256-{sha256[:12]} to point to")
            operations += self._differences(release, head, {place.file})
        title = f"Point {place.branch} at {_title(content)}" if place.is_pointer else f"Change {place.file}"
        return self._commit(place.branch, operations, head, title)

    def show(self, name: str) -> None:
        """Brings `main` to the state of the channel, if it is the one that main shows."""
        place = self._writable(name)
        if place.branch == _MAIN or (place.branch != _SHOWN and self._head(_SHOWN) is not None):
            return
        for _ in range(_ATTEMPTS):
            channel, main = self._head(place.branch), self._head(_MAIN)
            if channel is None or main is None:
                return
            operations = self._differences(channel, main, set(), hidden={_POINTER})
            if not operations or self._commit(_MAIN, operations, main, f"Show {place.branch}"):
                return
        raise self._contended(_MAIN)

    def _differences(self, source: str, target: str, kept: set[str], hidden: set[str] | None = None) -> list[Any]:
        """Returns the operations that give the commit `target` the files of `source`, apart from hidden ones.

        Args:
            kept: files of the target that stay.
            hidden: the hidden files that count.
        """

        def counted(commit: str) -> dict[str, Any]:
            tree = self._files(commit)
            return {path: file for path, file in tree.items() if not path.startswith(".") or path in (hidden or ())}

        wanted, present = counted(source), counted(target)
        copied = [path for path, file in wanted.items() if path not in present or present[path].blob_id != file.blob_id]
        operations = [hub_requests.copy(path, source) for path in sorted(copied)]
        return operations + [hub_requests.deletion(path) for path in sorted(present.keys() - wanted.keys() - kept)]

    def _addition(self, file: str, content: Path | bytes, sha256: str) -> Any:
        operation = hub_requests.addition(file, content)
        if operation.upload_info.sha256.hex() != sha256:
            raise UserError(f"{file}: changed while it was published; package the release again")
        return operation

    def _commit(self, branch: str, operations: list[Any], parent: str, title: str) -> bool:
        """Commits on a branch. Returns False if the branch has another commit than `parent` now."""

        def commit() -> bool:
            self._api.create_commit(
                self._repository, operations, revision=branch, parent_commit=parent, commit_message=title[:200]
            )
            return True

        return self._hub.ask(commit, {409: False, 412: False}, f"a commit on {branch}")

    def _start(self, branch: str) -> str:
        """Creates a branch at the repository's first commit, unless there is one, and returns its commit."""

        def create() -> None:
            self._api.create_branch(self._repository, branch=branch, revision=self._first, exist_ok=True)

        self._hub.ask(create, {409: None}, f"branch {branch}")
        found = self._head(branch)
        if found is None:
            raise UserError(f"{self.uri}: branch {branch} is missing after it was made; run again")
        return found

    def _contended(self, branch: str) -> UserError:
        return UserError(f"{self.uri}: other publishers change the branch {branch} all the time; run again later")

    # -- the repository

    def _place(self, name: str) -> Place | None:
        whole = self._prefix + name
        if self._revision:
            return Place(self._revision, whole, None) if "/" not in whole else None
        if match := re.fullmatch(r"([^/]+)/(sha256-[0-9a-f]{12})/([^/]+)", whole):
            return Place(match[2], match[3], match[1])
        if match := re.fullmatch(r"([^/]+)/channels/([^/]+)\.json", whole):
            return Place(match[2], _POINTER, match[1])
        return None

    def _writable(self, name: str) -> Place:
        """Returns the place of an object that is about to be written, in a repository that is ready for it."""
        place = self._place(name)
        if place is None or place.model is None or (place.is_pointer and place.branch.startswith("sha256-")):
            raise UserError(f"{self.uri}/{shown(name)}: is no name of a release's file or of a channel, as a hub takes")
        self.prepare(place.model)
        return place

    def prepare(self, model: str) -> None:
        """Makes the repository if there is none.

        Raises:
            UserError: it is open to more people than `publish.access` says, or is of another model or program.
        """
        if self._ready_for == model:
            return
        wanted = self._settings.access
        info = self._hub.ask(lambda: self._api.repo_info(self._repository), {404: None, 401: None}, "")
        if info is None:
            self._make(wanted)
            info = self._hub.ask(lambda: self._api.repo_info(self._repository), {}, "")
        found = "private" if info.private else "gated" if info.gated else "public"
        if _OPENNESS.index(found) > _OPENNESS.index(wanted):
            raise UserError(
                f"{self.uri}: is {found}, and publish.access is {wanted}; change it in the repository's settings on "
                f"the hub, or set publish.access to {found}"
            )
        if found != wanted:
            note(f"note: {self.uri} is {found}, and publish.access is {wanted}; its settings on the hub change that")
        owner = self._model()
        if owner is None and self._head(_MAIN) != self._first:
            raise UserError(f"{self.uri}: has files that lcmlora did not publish; name a repository of its own")
        if owner not in (None, model):
            raise UserError(
                f"{self.uri}: has releases of {shown(owner)}, not of {model}; a repository takes one model: set "
                f"publish.to to hf://{self._repository.partition('/')[0]}/lcm-lora-{{model}}"
            )
        self._ready_for = model

    def _make(self, access: str) -> None:
        """Makes the repository. It is private until it is gated: if this is killed, nothing is open."""

        def make() -> None:
            self._api.create_repo(self._repository, private=access != "public", exist_ok=True)

        self._hub.ask(make, {}, "its creation")
        if access == "gated":
            self._hub.ask(
                lambda: self._api.update_repo_settings(self._repository, gated="manual", private=False),
                {},
                "its settings",
            )

    def _model(self) -> str | None:
        """Returns the model whose releases the repository has; None if it has none."""
        branches = self._branches()
        for branch in (_MAIN, *sorted(each for each in branches if each.startswith("sha256-"))):
            head = branches.get(branch)
            for file in (_POINTER, _MANIFEST) if head else ():
                if head and file in self._files(head):
                    with tempfile.TemporaryDirectory(prefix="lcmlora-") as folder:
                        model = _fields(self._download(head, file, Path(folder)).read_bytes()).get("model")
                    if isinstance(model, str):
                        return model
        return None

    @cached_property
    def _first(self) -> str:
        """The repository's first commit. It has no release's files, so that branches begin there."""
        commits = self._hub.ask(
            lambda: self._api.list_repo_commits(self._repository, revision=_MAIN), {}, "its commits"
        )
        return str(commits[-1].commit_id)

    def _branches(self) -> dict[str, str]:
        refs = self._hub.ask(lambda: self._api.list_repo_refs(self._repository), {}, "its branches")
        return {branch.name: branch.target_commit for branch in refs.branches}

    def _head(self, branch: str) -> str | None:
        """Returns the commit of a branch, None where there is no such branch."""
        return self._hub.head(self._repository, branch)

    def _files(self, commit: str) -> dict[str, Any]:
        """Returns the files in the top folder at a commit, by name. A commit never changes, so it is asked for once."""
        if commit not in self._trees:
            self._trees[commit] = self._listing(commit, expand=False)
        return self._trees[commit]

    def _listing(self, revision: str, *, expand: bool) -> dict[str, Any]:
        def listed() -> dict[str, Any]:
            found = self._api.list_repo_tree(self._repository, revision=revision, expand=expand)
            return {each.path: each for each in found if hasattr(each, "blob_id")}

        return self._hub.ask(listed, {}, f"its files at {revision}")

    def _found(self, name: str) -> tuple[str, Any] | None:
        """Returns the commit of an object's branch, and the object's facts there; None if there is none."""
        place = self._place(name)
        head = self._head(place.branch) if place else None
        file = self._files(head).get(place.file) if place and head else None
        return None if head is None or file is None else (head, file)

    def _download(self, commit: str, file: str, folder: Path) -> Path:
        """Downloads a file to a folder that is empty, so that nothing of a cache is taken for it."""

        def download() -> Path:
            return Path(self._api.hf_hub_download(self._repository, file, revision=commit, local_dir=folder))

        return self._hub.ask(download, {}, file)


def _fields(content: bytes) -> dict[str, Any]:
    """Returns the fields of a pointer or a manifest, none where it is neither."""
    try:
        value = parse_json(content)
    except Malformed:
        return {}
    return value if isinstance(value, dict) else {}


def _title(content: bytes) -> str:
    return f"sha256-{str(_fields(content).get('sha256'))[:12]}"
