"""A server on this machine that answers the hub's own client as the hub does: repositories of files at commits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories by OWNER/NAME, each with one commit, which is also its branch `main`.

    requests: the paths that were asked for.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, tuple[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.busy = False  # answers 503

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """Adds a repository with these files and returns its commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repositories[repository] = (commit, files)
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and content for the path of a request."""
        self.requests.append(path)
        if self.busy:
            return 503, {}, b""
        words = unquote(urlsplit(path).path).strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        commit, files = self.repositories.get("/".join(words[:2]), ("", {}))
        revision = words[3] if len(words) > 3 else "main"
        if not commit:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in ("main", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if api and words[2:3] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        if api:
            info = {"id": "/".join(words[:2]), "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        name = "/".join(words[4:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return 200, {"ETag": tag, "X-Repo-Commit": commit}, files[name]


@contextlib.contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """Yields a hub that the client of this process asks in the block, with an empty cache of its own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, *, content: bool) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if content:
                self.wfile.write(body)

        def do_GET(self) -> None:
            self._answer(content=True)

        def do_HEAD(self) -> None:
            self._answer(content=False)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        address = f"http://127.0.0.1:{server.server_port}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
