"""Answers at the address of MLflow that are not MLflow's: another version, a web page, a proxy's error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lcmlora import registry
from lcmlora.config import Registry
from lcmlora.errors import Unavailable, UserError
from lcmlora.registry import tracking

PAGE = b'<!doctype html><html lang="en"><head><title>Sign in</title></head></html>'
Answer = Callable[[str], tuple[int, str, bytes]]  # by the path: status, type, body


class Peer:
    """A server on loopback that answers as a test says; it stands for what people have in front of MLflow."""

    def __init__(self) -> None:
        self.answer: Answer = lambda path: (404, "text/plain", b"")
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, kind, body = peer.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def settings(self) -> Registry:
        return Registry(tracking_uri=f"http://127.0.0.1:{self.server.server_port}")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking.answers.check_version.cache_clear()
    peer = Peer()
    yield peer
    peer.server.shutdown()
    peer.server.server_close()


def refusal(peer: Peer) -> UserError:
    with pytest.raises(UserError) as caught:
        registry.versions(peer.settings)
    line = str(caught.value)
    assert line.startswith(f"MLflow at {peer.settings.tracking_uri}: ") and "\n" not in line
    assert "doctype" not in line and "<html" not in line
    return caught.value


def versioned(version: bytes, answer: Answer) -> Answer:
    return lambda path: (200, "text/plain", version) if path == "/version" else answer(path)


def test_a_server_of_an_older_version_is_named_with_what_is_needed(peer: Peer):
    peer.answer = versioned(b"2.22.0", lambda path: (200, "text/html", PAGE))
    assert "is version 2.22.0, and lcmlora needs an MLflow server of version 3.0 or later: " in str(refusal(peer))


@pytest.mark.parametrize(
    "answer",
    [
        lambda path: (200, "text/html", PAGE),
        versioned(b"3.17.2", lambda path: (200, "text/html", PAGE)),
        versioned(b"3.17.2", lambda path: (404, "text/html", PAGE)),
        versioned(b"3.17.2", lambda path: (302, "text/html", PAGE)),
    ],
    ids=["everywhere", "in place of JSON", "not found", "without a place to go"],
)
def test_a_web_page_is_no_answer_and_is_not_printed(peer: Peer, answer: Answer):
    peer.answer = answer
    error = refusal(peer)
    assert "answers with a web page" in str(error) and not isinstance(error, Unavailable)


@pytest.mark.parametrize("body", [b"no json", b"[1, 2]", b'{"registered_models"', b"\xff\xfe"])
def test_what_is_not_mlflows_json_is_said_to_be_that(peer: Peer, body: bytes):
    peer.answer = versioned(b"3.17.2", lambda path: (200, "application/json", body))
    assert "answers with what is not MLflow's JSON" in str(refusal(peer))


def test_the_page_of_a_proxy_whose_server_is_away_may_be_asked_again(peer: Peer):
    peer.answer = versioned(b"3.17.2", lambda path: (502, "text/html", PAGE))
    assert isinstance(refusal(peer), Unavailable)


def test_a_server_that_tells_no_version_is_asked_all_the_same(peer: Peer):
    peer.answer = lambda path: (
        (200, "application/json", b"{}") if path.startswith("/api/") else (404, "text/html", PAGE)
    )
    assert registry.versions(peer.settings) == []
