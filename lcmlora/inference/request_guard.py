"""The door of MLflow's scoring server: what is too much is turned away, and errors are one line.

`mlflow models serve` builds its application right after it has loaded the model, and gives the model no say in it. So
the model, while it is loaded there, puts `Door` around that application (`stand_before_mlflow`). What other servers run
the model is theirs; `pyfunc_model.Drawer` keeps all limits but that of a request's bytes by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lcmlora.inference.limits import Limits
from lcmlora.inference.mlflow_internals import guard_next_application
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.io.terminal import joined

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

_PATH = "/invocations"
_SHOWN = 500  # characters of a message
# Bytes of a request over the limit that are taken and dropped: a client that still sends when the connection closes
# sees that it broke, and not why.
_DROPPED = 16 << 20
_CODES = {400: "INVALID_PARAMETER_VALUE", 408: "REQUEST_TIMEOUT", 413: "REQUEST_TOO_LARGE", 415: "BAD_REQUEST"}


@dataclass
class Request:
    """A request as the model sees it: when it has to end, and whether anybody still waits for it."""

    deadline: float  # of time.monotonic()
    gone: threading.Event = field(default_factory=threading.Event)
    reached: bool = False  # the model was asked: before, an error is that of the request

    def abandoned(self) -> bool:
        return self.gone.is_set() or time.monotonic() > self.deadline


# The request that is being answered; MLflow calls the model in another thread, which inherits this.
current: ContextVar[Request | None] = ContextVar("request", default=None)


def stand_before_mlflow(limits: Limits) -> bool:
    """Puts a Door around the application that MLflow's server makes next; returns False where it is another server."""
    return guard_next_application(lambda application: Door(application, limits))


class Door:
    """An ASGI application around another one, which answers requests for pictures."""

    def __init__(self, application: Application, limits: Limits) -> None:
        self._application = application
        self._limits = limits
        self._inside = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != _PATH or scope["method"] != "POST":
            await self._application(scope, receive, send)
            return
        if self._inside > self._limits.queue:
            text = f"{self._limits.queue} requests wait already (LCMLORA_MAX_QUEUE); ask again later"
            await _answer(send, 429, text, code="RESOURCE_EXHAUSTED")
            return
        self._inside += 1
        try:
            await self._let_in(scope, receive, send)
        finally:
            self._inside -= 1

    async def _let_in(self, scope: Message, receive: Receive, send: Send) -> None:
        request = Request(time.monotonic() + self._limits.seconds)
        headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
        try:
            body = await asyncio.wait_for(self._read(receive, headers), self._limits.seconds)
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            _expect(kind, body)
        except _Refused as error:
            await _answer(send, error.status, str(error))
            return
        except TimeoutError:
            await _answer(send, 408, f"the request took more than {self._limits.seconds} seconds to arrive")
            return
        if body is None:  # who asked has gone
            return
        await self._ask(scope, body, receive, send, request)

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes | None:
        told = headers.get(b"content-length", b"")
        patience = max(self._limits.body, _DROPPED)
        if told.isdigit() and (len(told) > 18 or int(told) > patience):
            raise _Refused(413, self._too_large())
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self._limits.body:
                body += part
            if size > patience or (size > self._limits.body and not message.get("more_body")):
                raise _Refused(413, self._too_large())
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> str:
        return f"the request has more than {self._limits.body} bytes (LCMLORA_MAX_BODY)"

    async def _ask(self, scope: Message, body: bytes, receive: Receive, send: Send, request: Request) -> None:
        """Asks the application, watches whether anybody still waits, and passes on its answer, an error as one line."""
        answered = asyncio.Event()
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await answered.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            request.gone.set()

        kept = _Kept()
        watching = asyncio.create_task(watch())
        token = current.set(request)
        try:
            await self._application(scope, replay, kept.take)
        except Exception as error:  # MLflow's own server would answer it as a page of text
            print(f"error: {type(error).__name__}: {joined(error, _SHOWN)}", file=sys.stderr, flush=True)
            kept = _Kept(status=500)
        finally:
            current.reset(token)
            answered.set()
            request.gone.set()  # nobody waits any more, whatever still draws
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        if kept.status == 200:
            for message in kept.messages:
                await send(message)
            return
        # What MLflow could not read was wrong in the request, whatever it makes of it.
        status = kept.status if request.reached or kept.status != 500 else 400
        await _answer(
            send, status, kept.text or "the request cannot be read as a table with a column `prompt`", kept.code
        )


@dataclass
class _Kept:
    """An answer that was not sent yet."""

    status: int = 500
    messages: list[Message] = field(default_factory=list)

    async def take(self, message: Message) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.start":
            self.status = message["status"]

    @property
    def _body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages if m["type"] == "http.response.body")

    @property
    def _said(self) -> dict[str, Any]:
        try:
            said = parse_json(self._body)
        except Malformed:
            return {}
        return said if isinstance(said, dict) else {}

    @property
    def code(self) -> str | None:
        code = self._said.get("error_code")
        return code if isinstance(code, str) else None

    @property
    def text(self) -> str:
        message = self._said.get("message")
        if isinstance(message, str):
            # MLflow puts the request before what the model said.
            return message.rpartition("\nError: ")[2]
        return "" if self.status == 500 else self._body.decode("utf-8", "replace")


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _expect(kind: bytes, body: bytes | None) -> None:
    if body is None:
        return
    if kind == b"application/json":
        try:
            value = parse_json(body)
        except Malformed as error:
            raise _Refused(400, f"the request is {error}") from None
        if not isinstance(value, dict):
            raise _Refused(400, "the request: expected an object with dataframe_records and params")
        for name, table in value.items():
            if name in ("dataframe_records", "instances", "inputs"):
                _expect_texts(table)
            elif name == "dataframe_split" and isinstance(table, dict):
                _expect_texts(table.get("data"))
        _expect_params(value.get("params"))
    elif kind != b"text/csv":  # a Parquet file of some kilobytes can hold gigabytes
        raise _Refused(415, "Content-Type: expected application/json or text/csv")


def _expect_texts(value: Any) -> None:
    """Raises _Refused where something in a table is no text: MLflow makes a text of a number in some of its formats."""
    inner = [value]
    while inner:
        each = inner.pop()
        if isinstance(each, list):
            inner += each
        elif isinstance(each, dict):
            inner += each.values()
        elif not isinstance(each, str):
            raise _Refused(400, f"prompt: expected text, got {joined(repr(each), 100)}")


def _expect_params(params: Any) -> None:
    from lcmlora.inference.serving import DEFAULTS

    if params is None:
        return
    if not isinstance(params, dict):
        raise _Refused(400, f"params: expected an object, got {joined(repr(params), _SHOWN)}")
    for name, value in params.items():
        if name not in DEFAULTS:
            raise _Refused(400, f"params: {joined(repr(name), _SHOWN)}: expected one of {', '.join(DEFAULTS)}")
        whole = name != "guidance"
        if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else int | float)):
            shown = joined(repr(value), 100)
            raise _Refused(400, f"{name}: expected a {'whole ' if whole else ''}number, got {shown}")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise _Refused(400, f"{name}: is out of all range")


async def _answer(send: Send, status: int, text: str, code: str | None = None) -> None:
    said = {"error_code": code or _CODES.get(status, "INTERNAL_ERROR"), "message": joined(text, _SHOWN)}
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # what is still to come is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
