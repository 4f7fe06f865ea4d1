"""A guard in front of MLflow's scoring server: it refuses requests over the limits, and errors become one line.

It also answers with the server's metrics, at /metrics.

`mlflow models serve` makes its application right after it has loaded the model, and offers no hook. So loading
the model wraps that application in `RequestGuard` (`guard_mlflow_server`). Other servers can run the model,
too: `pyfunc_model.Drawer` itself checks all limits but the number of a request's bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lcmlora.inference.limits import Limits
from lcmlora.inference.mlflow_internals import guard_next_application
from lcmlora.inference.production import metrics
from lcmlora.inference.production.metrics import ServingMetrics
from lcmlora.io.parsing import JsonObject, Malformed, parse_json
from lcmlora.io.terminal import joined

Message = MutableMapping[str, Any]  # of ASGI
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

_PATH = "/invocations"
_MESSAGE = 500  # characters of a message, at most
# Up to so many bytes, a request over the limit is read and dropped. A client that still sends when the connection
# closes would see a broken connection, and not the answer.
_DROPPED = 16 << 20
_CODES = {400: "INVALID_PARAMETER_VALUE", 408: "REQUEST_TIMEOUT", 413: "REQUEST_TOO_LARGE", 415: "BAD_REQUEST"}


@dataclass
class Request:
    """A request as the model sees it: its deadline, and whether the client still waits for the answer."""

    deadline: float  # on the clock of time.monotonic()
    disconnected: threading.Event = field(default_factory=threading.Event)  # nobody waits for the drawing any more
    client_left: bool = False  # before the answer
    reached_model: bool = False  # an error before that is a fault of the request
    steps: int | None = None  # that the pictures are drawn with, once the model has read them

    def abandoned(self) -> bool:
        """Returns whether nobody waits for the answer any more, or the time is over."""
        return self.disconnected.is_set() or time.monotonic() > self.deadline


# The request that is being answered. MLflow calls the model in another thread, which inherits this.
current: ContextVar[Request | None] = ContextVar("request", default=None)


def guard_mlflow_server(limits: Limits, served: ServingMetrics) -> bool:
    """Puts a RequestGuard around the application that MLflow's server makes next. Returns False in other servers."""
    return guard_next_application(lambda application: RequestGuard(application, limits, served))


class RequestGuard:
    """An ASGI application around MLflow's, which checks requests for pictures and rewrites errors.

    Args:
        served: counts the requests, and is what /metrics shows.
    """

    def __init__(self, application: Application, limits: Limits, served: ServingMetrics) -> None:
        self._application = application
        self._limits = limits
        self._served = served
        self._active = 0  # requests that are drawn or wait

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == metrics.PATH:
            await self._answer_with_metrics(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == _PATH and scope["method"] == "POST":
            await self._count(scope, receive, send)
        else:
            await self._application(scope, receive, send)

    async def _answer_with_metrics(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, f"{metrics.PATH}: expected GET, got {joined(scope['method'], 20)}")
        elif (application := self._served.application()) is None:
            text = f"this server has several workers: start it with {metrics.PROCESSES} set to a new, empty folder"
            await _answer(send, 503, text, code="TEMPORARILY_UNAVAILABLE")
        else:
            # Without the query, by which prometheus-client's application lets clients choose metrics.
            await application({**scope, "query_string": b""}, receive, send)

    async def _count(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers a request for pictures, and counts how it ended."""
        began, status = time.monotonic(), 0
        request = Request(began + self._limits.seconds)

        async def send_and_keep_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._queue(scope, receive, send_and_keep_status, request)
        finally:
            ended = 499 if request.client_left else status
            self._served.ended(ended, seconds=time.monotonic() - began, steps=request.steps)

    async def _queue(self, scope: Message, receive: Receive, send: Send, request: Request) -> None:
        """Answers a request, or refuses it where too many wait already."""
        if self._active > self._limits.queue:
            text = f"{self._limits.queue} requests wait already (LCMLORA_MAX_QUEUE); ask again later"
            await _answer(send, 429, text, code="RESOURCE_EXHAUSTED")
            return
        self._active += 1
        self._served.active(self._active)
        try:
            await self._answer_request(scope, receive, send, request)
        finally:
            self._active -= 1
            self._served.active(self._active)

    async def _answer_request(self, scope: Message, receive: Receive, send: Send, request: Request) -> None:
        headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
        try:
            body = await asyncio.wait_for(self._read(receive, headers), self._limits.seconds)
            media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            _check_body(media_type, body)
        except _Refused as error:
            await _answer(send, error.status, str(error))
            return
        except TimeoutError:
            await _answer(send, 408, f"the request took more than {self._limits.seconds} seconds to arrive")
            return
        if body is None:
            request.client_left = True
            return
        await self._forward(scope, body, receive, send, request)

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes | None:
        """Returns the body of a request, None where the client disconnects. Raises _Refused where it is too large."""
        length = headers.get(b"content-length", b"")
        most_read = max(self._limits.body, _DROPPED)
        if length.isdigit() and (len(length) > 18 or int(length) > most_read):
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
            if size > most_read or (size > self._limits.body and not message.get("more_body")):
                raise _Refused(413, self._too_large())
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> str:
        return f"the request has more than {self._limits.body} bytes (LCMLORA_MAX_BODY)"

    async def _forward(self, scope: Message, body: bytes, receive: Receive, send: Send, request: Request) -> None:
        """Passes a request on to the application, watches for a disconnect, and sends the answer."""
        answered = asyncio.Event()
        body_sent = False

        async def replay() -> Message:
            nonlocal body_sent
            if not body_sent:
                body_sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await answered.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            request.client_left = True
            request.disconnected.set()

        response = _CapturedResponse()
        watching = asyncio.create_task(watch())
        token = current.set(request)
        try:
            await self._application(scope, replay, response.capture)
        except Exception as error:  # MLflow's own server would answer with a page of text
            print(f"error: {type(error).__name__}: {joined(error, _MESSAGE)}", file=sys.stderr, flush=True)
            response = _CapturedResponse(status=500)
        finally:
            current.reset(token)
            answered.set()
            request.disconnected.set()  # stops a drawing that still runs
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        if response.status == 200:
            for message in response.messages:
                await send(message)
            return
        # MLflow answers 500 to some requests that it cannot read, where 400 is right.
        status = response.status if request.reached_model or response.status != 500 else 400
        text = response.text or "the request cannot be read as a table with a column `prompt`"
        await _answer(send, status, text, response.code)


@dataclass
class _CapturedResponse:
    """An application's answer that has not been sent yet."""

    status: int = 500
    messages: list[Message] = field(default_factory=list)

    async def capture(self, message: Message) -> None:
        """Keeps a message that the application sends."""
        self.messages.append(message)
        if message["type"] == "http.response.start":
            self.status = message["status"]

    @property
    def _body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages if m["type"] == "http.response.body")

    @property
    def _error(self) -> JsonObject:
        try:
            error = parse_json(self._body)
        except Malformed:
            return {}
        return error if isinstance(error, dict) else {}

    @property
    def code(self) -> str | None:
        """MLflow's code of an error, such as INVALID_PARAMETER_VALUE; None where there is none."""
        code = self._error.get("error_code")
        return code if isinstance(code, str) else None

    @property
    def text(self) -> str:
        """The error's message; empty where there is none that says more than the status."""
        message = self._error.get("message")
        if isinstance(message, str):
            # MLflow puts the whole request before the model's own message.
            return message.rpartition("\nError: ")[2]
        return "" if self.status == 500 else self._body.decode("utf-8", "replace")


class _Refused(Exception):
    """A request is refused, with this HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _check_body(media_type: bytes, body: bytes | None) -> None:
    """Raises _Refused where a request cannot be read, or has values that MLflow would convert silently."""
    if body is None:
        return
    if media_type == b"application/json":
        try:
            value = parse_json(body)
        except Malformed as error:
            raise _Refused(400, f"the request is {error}") from None
        if not isinstance(value, dict):
            raise _Refused(400, "the request: expected an object with dataframe_records and params")
        for name, table in value.items():
            if name in ("dataframe_records", "instances", "inputs"):
                _check_texts(table)
            elif name == "dataframe_split" and isinstance(table, dict):
                _check_texts(table.get("data"))
        _check_params(value.get("params"))
    elif media_type != b"text/csv":  # a Parquet file of some kilobytes can hold gigabytes
        raise _Refused(415, "Content-Type: expected application/json or text/csv")


def _check_texts(value: object) -> None:
    """Raises _Refused where a value of a table is no text: in some formats, MLflow would convert a number to text."""
    inner = [value]
    while inner:
        each = inner.pop()
        if isinstance(each, list):
            inner += each
        elif isinstance(each, dict):
            inner += each.values()
        elif not isinstance(each, str):
            raise _Refused(400, f"prompt: expected text, got {joined(repr(each), 100)}")


def _check_params(params: object) -> None:
    """Raises _Refused where a parameter is unknown or has another type than the model's signature says."""
    from lcmlora.inference.serving import DEFAULTS

    if params is None:
        return
    if not isinstance(params, dict):
        raise _Refused(400, f"params: expected an object, got {joined(repr(params), _MESSAGE)}")
    for name, value in params.items():
        if name not in DEFAULTS:
            raise _Refused(400, f"params: {joined(repr(name), _MESSAGE)}: expected one of {', '.join(DEFAULTS)}")
        whole = name != "guidance"
        if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else int | float)):
            shown = joined(repr(value), 100)
            raise _Refused(400, f"{name}: expected a {'whole ' if whole else ''}number, got {shown}")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise _Refused(400, f"{name}: does not fit a 64-bit integer")


async def _answer(send: Send, status: int, text: str, code: str | None = None) -> None:
    error = {"error_code": code or _CODES.get(status, "INTERNAL_ERROR"), "message": joined(text, _MESSAGE)}
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the request is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
