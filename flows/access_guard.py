"""What stands before Prefect's and MLflow's servers: a request must name this machine, and come from no other page.

Passwords keep people out; this keeps out pages of other sites in the browser of a person who is logged in, also where
a name of theirs points at this machine (DNS rebinding).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_NAMES = ("127.0.0.1", "localhost")  # the port may be another one: `ssh -L 9000:127.0.0.1:4200`


class Gate:
    """An ASGI application that passes on what may come in, and answers 403 to the rest.

    Args:
        app: the server.
        origins: of pages that may ask it, beside those that it serves under the address that is asked.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._refuse(scope["headers"]) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})  # 403 instead of a handshake
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})

    def _refuse(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Returns why a request with these headers is refused."""
        found = [(name.lower(), value.decode("latin-1")) for name, value in headers]
        hosts = [value for name, value in found if name == b"host"]
        if len(hosts) != 1 or _name(hosts[0]) not in _NAMES:
            return f"this server answers to {' and '.join(_NAMES)} only"
        for name, value in found:
            if name == b"origin" and value not in self._origins and value != f"http://{hosts[0]}":
                return "this server answers its own pages only"
        return None


def prefect() -> Gate:
    """Prefect's server; a factory for uvicorn."""
    from tasks import prefect_internals

    return Gate(prefect_internals.server(), _listed("PREFECT_SERVER_CORS_ALLOWED_ORIGINS"))


def mlflow() -> Gate:
    """MLflow's server with passwords; a factory for `mlflow server --app-name lcmlora`, which pyproject.toml names."""
    from lcmlora.inference import mlflow_internals

    return Gate(mlflow_internals.server_with_passwords(), _listed("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"))


def _listed(variable: str) -> list[str]:
    return os.environ[variable].split(",")


def _name(host: str) -> str | None:
    """Returns the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
