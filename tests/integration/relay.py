"""What stands before a server: a relay of HTTP requests, which keeps them, and a wire, which can be cut."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
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
    """Passes requests on to the server at a port of this machine, from a port of its own.

    Args:
        own: its port, by default a free one.

    Attributes:
        away: requests get no answer, and their connections are closed.
    """

    def __init__(self, port: int, own: int = 0) -> None:
        self._target = port
        self.away = False
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

        self._server = ThreadingHTTPServer(("127.0.0.1", own), Handler)
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
        if due or self.away:
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


class Wire:
    """Passes connections of any kind, websockets too, on to the server at a port of this machine, until it is cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._whole = True
        self._ends: list[socket.socket] = []
        self._left: int | None = None
        self._action: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Breaks all connections, and closes new ones at once."""
        self._whole = False
        while self._ends:
            with contextlib.suppress(OSError):
                self._ends.pop().shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Passes new connections on."""
        self._whole = True

    def after(self, count: int, action: Callable[[], None]) -> None:
        """Does this once, when so many more bytes have come for the server, before the last of them are passed on."""
        with self._lock:
            self._left, self._action = count, action

    def _count(self, block: bytes) -> None:
        with self._lock:
            if self._left is None:
                return
            self._left -= len(block)
            if self._left > 0:
                return
            self._left = None
        self._action()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target)) if self._whole else None
            except OSError:
                far = None
            if far is None:
                near.close()
                continue
            self._ends += [near, far]
            for source, sink, seen in ((near, far, self._count), (far, near, _unseen)):
                threading.Thread(target=_pass_bytes, args=(source, sink, seen), daemon=True).start()


def _unseen(block: bytes) -> None:
    del block


def _pass_bytes(source: socket.socket, sink: socket.socket, seen: Callable[[bytes], None]) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(1 << 16):
            seen(block)
            sink.sendall(block)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
