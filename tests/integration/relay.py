"""A door before an HTTP server: it keeps what went in, and something may happen at a certain request."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

_OF_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


@dataclass(frozen=True)
class Request:
    line: str  # such as `POST /api/2.0/mlflow/runs/create`
    body: bytes


class Relay:
    """Passes requests on to the server at a port of this machine, from a port of its own."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._pattern: re.Pattern[str] | None = None
        self._action: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                relay._pass_on(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def at(self, pattern: str, action: Callable[[], None]) -> None:
        """Does this once instead of passing a request on, when one comes whose line the pattern matches."""
        with self._lock:
            self._pattern, self._action = re.compile(pattern), action

    def headers_for(self, command: str, path: str, headers: dict[str, str], body: bytes) -> dict[str, str]:
        """Returns the headers of a request as it is passed on."""
        return headers

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(f"{handler.command} {handler.path}", _body(handler))
        with self._lock:
            self.requests.append(request)
            due = self._pattern is not None and self._pattern.search(request.line) is not None
            if due:
                self._pattern = None
        if due:
            self._action()
            handler.close_connection = True
            return
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _OF_ONE_HOP}
        headers = self.headers_for(handler.command, handler.path, headers, request.body)
        connection = http.client.HTTPConnection("127.0.0.1", self._target, timeout=60)
        try:
            connection.request(handler.command, handler.path, request.body or None, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):  # a server that is gone: so is the connection to it
            handler.close_connection = True
            return
        finally:
            connection.close()
        handler.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _OF_ONE_HOP:
                handler.send_header(name, value)
        told = answer.getheader("Content-Length") if handler.command == "HEAD" else None
        handler.send_header("Content-Length", told or str(len(content)))
        handler.end_headers()
        try:
            handler.wfile.write(content)
        except OSError:  # the client went away
            handler.close_connection = True


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    parts = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(parts)
