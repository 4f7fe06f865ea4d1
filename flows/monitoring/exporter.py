"""The exporter of `lcmlora metrics`: it looks at the sources in the background, and a scrape reads what it saw last."""

from __future__ import annotations

import base64
import binascii
import hmac
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, make_asgi_app, write_to_textfile
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lcmlora import masking
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows.access_guard import AccessGuard
from lcmlora.flows.credentials import Login
from lcmlora.flows.monitoring.sources import Families, Source
from lcmlora.io import faults
from lcmlora.io.terminal import note

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_PATH = "/metrics"


class Exporter(Collector):
    """The metrics that all sources had when they were last looked at.

    A source that does not answer has none, and `lcmlora_collection_success` is 0 for it: old figures would look new.

    Args:
        read_settings: returns the project's settings as they are now.
    """

    def __init__(self, sources: Sequence[Source], read_settings: Callable[[], Config]) -> None:
        self._sources = list(sources)
        self._read_settings = read_settings
        self._lock = threading.Lock()
        self._seen: dict[str, Families] = {}  # by source
        self._succeeded: dict[str, bool] = {}
        self._times: dict[str, tuple[float, float]] = {}  # of the last success, and the seconds of the last look

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics, for a scrape. No source is looked at."""
        with self._lock:
            families = [family for source in self._sources for family in self._seen.get(source.name, [])]
            succeeded, times = dict(self._succeeded), dict(self._times)
        yield from families
        success = GaugeMetricFamily("lcmlora_collection_success", "1 if the source answered.", labels=["source"])
        ages = GaugeMetricFamily(
            "lcmlora_collection_timestamp_seconds", "When the source last answered.", labels=["source"]
        )
        seconds = GaugeMetricFamily("lcmlora_collection_seconds", "Seconds of the last look.", labels=["source"])
        for name, answered in succeeded.items():
            success.add_metric([name], answered)
            last, took = times[name]
            seconds.add_metric([name], took)
            if last:
                ages.add_metric([name], last)
        yield from (success, ages, seconds)

    def describe(self) -> Iterable[Metric]:
        """Returns nothing, so that registration does not ask for the metrics."""
        return ()

    def look(self, source: Source) -> bool:
        """Looks at a source, and returns whether it answered. A reason is noted where it has begun to fail."""
        began = time.monotonic()
        families: Families = []
        reason = None
        try:
            families = source.collect(self._read_settings())
        except UserError as error:
            reason = str(error)
        except Exception as error:  # a fault of one source takes no other's metrics
            reason = faults.explain(error) or masking.text(f"{type(error).__name__}: {error}")
            print(masking.text("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        with self._lock:
            failed_before = not self._succeeded.get(source.name, True)
            self._seen[source.name] = families
            self._succeeded[source.name] = reason is None
            last = time.time() if reason is None else self._times.get(source.name, (0.0, 0.0))[0]
            self._times[source.name] = (last, time.monotonic() - began)
        if reason is not None and not failed_before:
            note(f"warning: no metrics of {source.name}: {reason}")
        if reason is None and failed_before:
            note(f"metrics of {source.name} are there again")
        return reason is None

    def look_at_all(self) -> bool:
        """Looks at all sources, one after the other, and returns whether all answered."""
        answered = [self.look(source) for source in self._sources]
        return all(answered)

    def keep_looking(self, stop: threading.Event) -> list[threading.Thread]:
        """Starts a thread for each source that looks at it again and again until `stop` is set."""

        def repeat(source: Source) -> None:
            while True:
                self.look(source)
                if stop.wait(source.seconds):
                    return

        threads = [threading.Thread(target=repeat, args=[source], daemon=True) for source in self._sources]
        for thread in threads:
            thread.start()
        return threads

    @property
    def registry(self) -> CollectorRegistry:
        """A registry with these metrics alone."""
        registry = CollectorRegistry()
        registry.register(self)
        return registry


class Endpoint:
    """The ASGI application that answers GET /metrics, to whoever has the login if there is one."""

    def __init__(self, registry: CollectorRegistry, login: Login | None) -> None:
        self._metrics: Any = make_asgi_app(registry)
        self._login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # uvicorn's startup and shutdown
        headers: list[tuple[bytes, bytes]] = [(b"content-type", b"text/plain; charset=utf-8")]
        if self._login is not None and not _is_login(scope["headers"], self._login):
            headers.append((b"www-authenticate", b'Basic realm="lcmlora"'))
            await _answer(send, 401, "expected the name and password of LCMLORA_METRICS_LOGIN", headers)
        elif scope["path"] != _PATH:
            await _answer(send, 404, f"the metrics are at {_PATH}", headers)
        elif scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, "expected GET", headers)
        else:
            await self._metrics(scope, receive, send)


async def _answer(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def _is_login(headers: Iterable[tuple[bytes, bytes]], login: Login) -> bool:
    given = [value for name, value in headers if name.lower() == b"authorization"]
    scheme, _, encoded = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if scheme.lower() != b"basic":
        return False
    try:
        pair = base64.b64decode(encoded.strip(), validate=True)
    except binascii.Error:
        return False
    return hmac.compare_digest(pair, login.pair.encode())


def serve(exporter: Exporter, host: str, port: int, login: Login | None) -> None:
    """Answers scrapes until the process is interrupted.

    Args:
        host: the address to listen on. On this machine's own, requests that name another host are refused.

    Raises:
        UserError: the port is taken, or others than this machine could ask without a password.
    """
    import uvicorn

    is_local = host in ("127.0.0.1", "localhost")
    if login is None and not is_local:
        raise UserError(
            f"--host {host}: other machines could read the metrics without a password; set LCMLORA_METRICS_LOGIN to "
            "NAME:PASSWORD, which Prometheus then gives as basic_auth"
        )
    application: ASGIApp = Endpoint(exporter.registry, login)
    if is_local:
        application = AccessGuard(application, ())
    stop = threading.Event()
    exporter.keep_looking(stop)
    note(f"metrics at http://{host}:{port}{_PATH}; Ctrl-C ends it")
    try:
        uvicorn.run(application, host=host, port=port, log_level="warning", lifespan="off")
    except SystemExit:  # uvicorn's, after it has said why
        raise UserError(f"--port {port}: cannot listen at {host}:{port}; name another one") from None
    finally:
        stop.set()


def write(exporter: Exporter, path: Path) -> bool:
    """Looks at all sources and writes the metrics for node_exporter's textfile collector, in one step.

    Returns:
        Whether all sources answered. The file says which did not.
    """
    complete = exporter.look_at_all()
    write_to_textfile(str(path), exporter.registry)
    return complete
