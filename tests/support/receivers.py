"""Receivers of notifications on this machine: an HTTP server that answers as it is told, and a mail server."""

from __future__ import annotations

import email
import email.policy
import json
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """What an HTTP server was sent, and what it answers."""

    address: str
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)  # path, headers, content
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # the next ones; 200 after the last
    released: threading.Event = field(default_factory=threading.Event)  # answers wait for it

    @property
    def documents(self) -> list[dict[str, Any]]:
        return [json.loads(content) for _, _, content in self.requests]


@contextmanager
def receiver(context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Yields an HTTP server, or one of HTTPS with this context."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append((self.path, dict(self.headers.items()), content))
            status, headers = found.answers.pop(0) if found.answers else (200, {})
            found.released.wait(60)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")  # as Slack says it
            except OSError:
                assert found.released.is_set()  # the client did not wait

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if context is None else "https"
    found = Receiver(f"{scheme}://127.0.0.1:{server.server_address[1]}")
    found.released.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.released.set()
        server.shutdown()
        server.server_close()


@dataclass
class Mailbox:
    """The mails that an SMTP server has taken."""

    address: str  # of the server, as 127.0.0.1:2525
    mails: list[EmailMessage] = field(default_factory=list)
    refuses: bool = False


@contextmanager
def mail_server() -> Iterator[Mailbox]:
    """Yields an SMTP server (RFC 5321) without encryption and passwords."""

    class Session(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self._answer("220 test")
            while line := self.rfile.readline().decode().strip():
                verb = line.split()[0].upper()
                if verb in ("EHLO", "HELO"):
                    self._answer("250 test")
                elif verb == "RCPT" and found.refuses:
                    self._answer("550 no such mailbox")
                elif verb == "DATA":
                    self._answer("354 go on")
                    found.mails.append(self._mail())
                    self._answer("250 taken")
                elif verb == "QUIT":
                    self._answer("221 bye")
                    return
                else:
                    self._answer("250 ok")

        def _mail(self) -> EmailMessage:
            lines = []
            while (line := self.rfile.readline()) != b".\r\n":
                lines.append(line.removeprefix(b".") if line.startswith(b"..") else line)
            return email.message_from_bytes(b"".join(lines), policy=email.policy.default)  # type: ignore[return-value]

        def _answer(self, line: str) -> None:
            self.wfile.write(f"{line}\r\n".encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Session) as server:
        server.daemon_threads = True
        found = Mailbox(f"127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield found
        finally:
            server.shutdown()
