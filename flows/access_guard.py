"""A guard in front of Prefect's and MLflow's servers: it refuses requests that pages of other sites send.

Passwords keep other people out. They do not stop a page of another site in the browser of a person who is logged in,
such as one whose domain name points to this machine (DNS rebinding). So the header Host must name this machine, and the
header Origin must be one of the server's own pages.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_REGAINED = 120.0  # seconds: of three tries at intervals of up to half a minute, and of a server that starts slowly
_HOSTS = ("127.0.0.1", "localhost")  # with any port, as `ssh -L 9000:127.0.0.1:4200` changes it


class AccessGuard:
    """An ASGI application that passes allowed requests on to the server, and answers 403 to the others.

    Args:
        app: the server.
        origins: of pages that may send requests, beside those at the address that the request names.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self._refusal(scope["headers"]) if scope["type"] in ("http", "websocket") else None
        if reason is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})  # 403 instead of a handshake
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})

    def _refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Returns why a request with these headers is refused, None where it is allowed."""
        decoded = [(name.lower(), value.decode("latin-1")) for name, value in headers]
        hosts = [value for name, value in decoded if name == b"host"]
        if len(hosts) != 1 or _host_name(hosts[0]) not in _HOSTS:
            return f"this server answers to {' and '.join(_HOSTS)} only"
        for name, value in decoded:
            if name == b"origin" and value not in self._origins and value != f"http://{hosts[0]}":
                return "this server answers its own pages only"
        return None


def prefect() -> AccessGuard:
    """Returns Prefect's server behind the guard; a factory for uvicorn.

    Slots that were held when it ended stay taken for some minutes, in which their holders find it again.
    """
    from lcmlora.flows.servers import logs
    from lcmlora.tasks import prefect_internals

    logs.keep_small()
    prefect_internals.renew_expired_leases(_REGAINED)
    return AccessGuard(prefect_internals.server(), _list("PREFECT_SERVER_CORS_ALLOWED_ORIGINS"))


def mlflow() -> AccessGuard:
    """Returns MLflow's server with passwords behind the guard, for `mlflow server --app-name lcmlora`."""
    from lcmlora.flows.servers import logs
    from lcmlora.inference import mlflow_internals

    logs.keep_small()
    return AccessGuard(mlflow_internals.server_with_passwords(), _list("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"))


def _list(variable: str) -> list[str]:
    return os.environ[variable].split(",")


def _host_name(host: str) -> str | None:
    """Returns the name in a Host header without the port, None where there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
