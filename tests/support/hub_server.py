"""A hub on this machine, for huggingface_hub's own client: repositories with branches, commits, LFS and access.

It speaks what the client asks when it makes a repository, uploads by LFS, commits, branches and downloads. It refuses
as the hub does: a missing or wrong token (401, 403), a commit on a branch that has moved (412), a branch that is there
(409), an object whose bytes have another SHA-256. Xet has no server to run; without it the client uploads by LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

WRITER, READER = "hf_MARKED_SECRET_writer", "hf_MARKED_SECRET_reader"  # tokens
_LFS = (".safetensors", ".png")


@dataclass(frozen=True)
class Blob:
    """A file's content, of which Git holds the bytes, or a pointer to them."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's digest: of the pointer, if the bytes are in LFS."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        held = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(f"blob {len(held)}\0".encode() + held).hexdigest()


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    visibility: str
    gated: str | bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> str:
        parent = self.branches.get(branch)
        facts = [parent, branch, title, len(self.commits), sorted((name, blob.oid) for name, blob in files.items())]
        made = Commit(hashlib.sha1(json.dumps(facts).encode()).hexdigest(), parent, title, files)
        self.commits[made.id] = made
        self.branches[branch] = made.id
        return made.id

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass(frozen=True)
class Answer:
    status: int = 200
    value: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes | None = None

    @property
    def body(self) -> bytes:
        return self.content if self.content is not None else json.dumps(self.value).encode()


def error(status: int, message: str, code: str = "") -> Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, headers)


class HubServer:
    """The hub's state, and what happens at certain requests.

    requests: `METHOD path` of each.
    faults: what happens to further ones, see `at`.
    """

    def __init__(self) -> None:
        self.uri = ""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.requests: list[str] = []
        self.damaged: dict[str, bytes] = {}  # by file name: what is downloaded instead
        self._lock = threading.RLock()
        self.faults: list[tuple[re.Pattern[str], int, Callable[[], Answer | None]]] = []

    def at(self, pattern: str, action: Callable[[], Answer | None], times: int = 1) -> None:
        """Answers so many of the next requests that the pattern matches with what `action` returns, if anything."""
        with self._lock:
            self.faults += [(re.compile(pattern), times, action)] if times else []

    def files(self, repository: str, revision: str) -> dict[str, bytes]:
        found = self.repositories[repository].find(revision)
        assert found is not None, revision
        return {name: blob.content for name, blob in found.files.items() if name != ".gitattributes"}

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)

    # -- requests

    def answer(self, method: str, target: str, body: bytes, token: str) -> Answer:
        with self._lock:
            self.requests.append(f"{method} {unquote(target)}")
            fault = self._fault(f"{method} {unquote(target)}")
        if fault is not None and (answer := fault()) is not None:
            return answer
        with self._lock:
            url = urlsplit(target)
            words = [unquote(word) for word in url.path.strip("/").split("/")]
            return self._route(method, words, parse_qs(url.query), body, token)

    def _fault(self, request: str) -> Callable[[], Answer | None] | None:
        for number, (pattern, times, action) in enumerate(self.faults):
            if pattern.search(request):
                self.faults[number : number + 1] = [(pattern, times - 1, action)] if times > 1 else []
                return action
        return None

    def _route(self, method: str, words: list[str], query: dict[str, list[str]], body: bytes, token: str) -> Answer:
        if words[:2] == ["api", "validate-yaml"]:
            return Answer(200, {"errors": [], "warnings": []})
        if words[0] == "lfs":
            return self._store_object(words[1], body) if method == "PUT" else Answer(200, {})
        if words == ["api", "repos", "create"]:
            return self._create(json.loads(body), token)
        name = "/".join(words[2:4] if words[:2] == ["api", "models"] else words[:2]).removesuffix(".git")
        repository = self.repositories.get(name)
        writes = method not in ("GET", "HEAD") and "paths-info" not in words
        if refused := self._access(repository, writes, token):
            return refused
        assert repository is not None
        if words[:2] != ["api", "models"]:
            rest = words[2:]
            if rest[:1] == ["info"]:
                return self._batch(json.loads(body))
            return self._resolve(repository, rest[1], "/".join(rest[2:]))
        return self._api(repository, method, words[4:], query, body)

    def _access(self, repository: Repository | None, writes: bool, token: str) -> Answer | None:
        known = token in (WRITER, READER)
        if token and not known:
            return error(401, "Invalid username or password.")
        if repository is None or (repository.visibility == "private" and not known):
            return error(404 if known else 401, "Repository not found", "RepoNotFound")
        if writes and token != WRITER:
            return error(403, "You don't have the rights to write to this repository")
        if repository.gated and not known:
            return error(401, "Access to this model is restricted.", "GatedRepo")
        return None

    def _create(self, asked: dict[str, Any], token: str) -> Answer:
        if token != WRITER:
            return error(403 if token == READER else 401, "You don't have the rights to create a model")
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": f"{self.uri}/{name}"})
        made = self.repositories[name] = Repository(asked.get("visibility", "public"))
        made.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return Answer(200, {"url": f"{self.uri}/{name}", "name": name})

    def _api(
        self, repository: Repository, method: str, words: list[str], query: dict[str, list[str]], body: bytes
    ) -> Answer:
        verb, revision = words[0] if words else "revision", words[1] if len(words) > 1 else "main"
        if verb == "settings":
            asked = json.loads(body)
            repository.visibility = asked.get("visibility", repository.visibility)
            repository.gated = asked.get("gated", repository.gated)
            return Answer(200, asked)
        if verb == "refs":
            listed = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.branches.items()]
            return Answer(200, {"branches": listed, "converts": [], "tags": []})
        if verb == "branch" and method == "DELETE":
            found = repository.branches.pop(revision, None)
            return Answer(200, {}) if found else error(404, "Reference not found", "RevisionNotFound")
        if verb == "branch":
            return self._branch(repository, revision, json.loads(body or b"{}"))
        found = repository.find(revision)
        if found is None:
            return error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if verb == "revision":
            info = {"id": "x/y", "sha": found.id, "siblings": [{"rfilename": name} for name in found.files]}
            return Answer(200, info | {"private": repository.visibility == "private", "gated": repository.gated})
        if verb == "commits":
            return Answer(200, list(self._history(repository, found)))
        if verb == "tree":
            return Answer(200, [self._entry(n, b, "expand" in str(query)) for n, b in found.files.items()])
        if verb == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            return Answer(200, [self._entry(n, b, False) for n, b in found.files.items() if n in paths])
        if verb == "preupload":
            return Answer(200, {"files": [self._mode(found, file["path"]) for file in json.loads(body)["files"]]})
        if verb == "commit":
            return self._commit(repository, revision, found, [json.loads(line) for line in body.splitlines()])
        return error(404, f"no {method} {words} here")

    def _branch(self, repository: Repository, name: str, asked: dict[str, Any]) -> Answer:
        if name in repository.branches:
            return error(409, "Reference already exists")
        start = repository.find(asked.get("startingPoint", "main"))
        if start is None:
            return error(404, "Invalid starting point", "RevisionNotFound")
        repository.branches[name] = start.id
        return Answer(200, {})

    def _history(self, repository: Repository, last: Commit) -> Iterator[dict[str, Any]]:
        commit: Commit | None = last
        while commit is not None:
            facts = {"id": commit.id, "title": commit.title, "message": "", "date": "2026-11-29T12:00:00.000Z"}
            yield facts | {"authors": [{"user": "owls"}]}
            commit = repository.commits.get(commit.parent or "")

    def _entry(self, name: str, blob: Blob, expand: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        if expand:
            entry["lastCommit"] = {"id": "0" * 40, "title": "x", "date": "2026-11-29T12:00:00.000Z"}
        return entry

    def _mode(self, found: Commit, path: str) -> dict[str, Any]:
        present = found.files.get(path)
        mode = "lfs" if path.endswith(_LFS) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": present.oid if present else None}

    def _batch(self, asked: dict[str, Any]) -> Answer:
        objects = []
        for each in asked["objects"]:
            missing = each["oid"] not in self.objects
            actions = {
                "upload": {"href": f"{self.uri}/lfs/{each['oid']}"},
                "verify": {"href": f"{self.uri}/lfs/verify"},
            }
            objects.append(each | ({"actions": actions} if missing else {}))
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _store_object(self, oid: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return error(400, "the SHA-256 differs")
        self.objects[oid] = body
        return Answer(200, {})

    def _commit(self, repository: Repository, branch: str, found: Commit, lines: list[dict[str, Any]]) -> Answer:
        header, files = lines[0]["value"], dict(found.files)
        if header.get("parentCommit", found.id) != found.id:
            return error(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return error(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif files.pop(value["path"], None) is None:
                return error(404, "A file with this name doesn't exist", "EntryNotFound")
        made = repository.commit(branch, files, header["summary"])
        return Answer(200, {"success": True, "commitOid": made, "commitUrl": f"{self.uri}/x/y/commit/{made}"})

    def _resolve(self, repository: Repository, revision: str, name: str) -> Answer:
        found = repository.find(revision)
        if found is None:
            return error(404, "Invalid rev id", "RevisionNotFound")
        blob = found.files.get(name)
        if blob is None:
            return error(404, "Entry not found", "EntryNotFound")
        etag = blob.sha256 if blob.lfs else blob.oid
        content = self.damaged.get(name, blob.content)
        return Answer(200, None, {"ETag": f'"{etag}"', "X-Repo-Commit": found.id}, content)


@contextlib.contextmanager
def serving(cache: Path, token: str | None = WRITER) -> Iterator[HubServer]:
    """Yields a hub that the client of this process asks in the block, with an empty cache of its own."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer goes out at once, and not after the client's delayed acknowledgement of its header

        def _answer(self) -> None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            found = hub.answer(self.command, self.path, body, token)
            self.send_response(found.status)
            for name, value in (found.headers | {"Content-Length": str(len(found.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found.body)

        def _chunk(self) -> bytes:
            content = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
            self.rfile.readline()
            return content

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.uri = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.uri)
        files = f"{hub.uri}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "no-token"))
        if token:
            patch.setenv("HF_TOKEN", token)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
