"""Another user of this machine: tries what they are told to, as `nobody` where this is started by root.

python -m tests.integration.stranger reads a JSON list of attempts and prints what came of each. All that they need is
imported before the user changes, who may be unable to read it.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401
import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import h2.connection  # noqa: F401
import httpcore._sync.http2  # noqa: F401
import httpx
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidHandshake

NOBODY = 65534
ROOT = Path(__file__).parents[2]


def attempt(attempts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what came of each: `status`, `origin` (who else may read the answer), `body`, or why it was `refused`.

    Attempts are `{"url": ..., "method": ..., "headers": ..., "json" or "content": ...}`, `{"grpc": url}`,
    `{"websocket": url}`, `{"socket": path}` and `{"file": path}`.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.stranger"],
        input=json.dumps(attempts),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def ask(of: dict[str, Any], context: ssl.SSLContext) -> dict[str, Any]:
    """Returns what came of one attempt over HTTP or gRPC, over TLS with this certificate where the address says so."""
    request = {"method": "GET", **of}
    is_grpc = "grpc" in request
    if is_grpc:
        # An empty message, without compression.
        headers = {"content-type": "application/grpc", "te": "trailers"}
        request = {"method": "POST", "url": of["grpc"], "content": "\0" * 5, "headers": headers}
    try:
        with httpx.Client(http1=not is_grpc, http2=is_grpc, verify=context, timeout=20) as client:
            answer = client.request(**request)
    except httpx.HTTPError as error:
        return {"refused": repr(error)}
    origin = answer.headers.get("access-control-allow-origin")
    return {"status": answer.status_code, "origin": origin, "body": answer.text[:200]}


def _ask_websocket(url: str) -> dict[str, Any]:
    for protocols in ([websockets.Subprotocol("prefect")], None):
        try:
            with websockets.sync.client.connect(url, subprotocols=protocols, open_timeout=20) as connection:
                if protocols:
                    connection.send(json.dumps({"type": "auth", "token": "lcmlora:guessed"}))
                connection.send("{}")
                return {"body": str(connection.recv(20))[:200]}
        except (InvalidHandshake, ConnectionClosed) as error:
            refused = repr(error)
    return {"refused": refused}


def _reach(of: dict[str, Any], context: ssl.SSLContext) -> dict[str, Any]:
    try:
        if "websocket" in of:
            return _ask_websocket(of["websocket"])
        if "socket" in of:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(of["socket"])
            return {"body": "connected"}
        if "file" in of:
            return {"body": Path(of["file"]).read_text(errors="replace")}
    except OSError as error:
        return {"refused": repr(error)}
    return ask(of, context)


def main() -> None:
    attempts = json.load(sys.stdin)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    print(json.dumps([_reach(each, context) for each in attempts]))


if __name__ == "__main__":
    main()
