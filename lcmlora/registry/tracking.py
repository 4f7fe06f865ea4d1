"""MLflow: the run of a distillation, and how its server is reached.

Every call names the tracking server it talks to; no process-wide state is set but MLflow's own environment defaults.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora import masking
from lcmlora.config import Registry
from lcmlora.errors import Unavailable, UserError
from lcmlora.inference.mlflow_internals import start_system_monitor
from lcmlora.io.files import write_json
from lcmlora.io.parsing import as_object, read_json
from lcmlora.io.terminal import note

if TYPE_CHECKING:
    from PIL.Image import Image

_FLUSH_SECONDS = 5.0
_SYSTEM_SECONDS = 10.0  # between two readings of the machine
_RUN_FILE = "mlflow_run.json"  # in the scratch folder of a distillation: a resumed one continues its run

# Set before MLflow is imported. Its own defaults retry for minutes where nothing listens.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_TRANSPORT = {
    *(f"requests.{name}" for name in ("ConnectionError", "Timeout", "ChunkedEncodingError", "RetryError")),
    *(f"urllib3.{name}" for name in ("NewConnectionError", "MaxRetryError", "TimeoutError", "ProtocolError")),
    *(f"botocore.{name}" for name in ("HTTPClientError", "ConnectionError")),
}
_BUSY = (429, 500, 502, 503, 504)  # HTTP


class Run:
    """One MLflow run that figures are logged to, in batches. Without a client it keeps nothing."""

    def __init__(self, client: Any, run_id: str | None, settings: Registry | None) -> None:
        self._monitor = None
        if run_id and settings and settings.system_metrics:
            self._monitor = start_system_monitor(run_id, settings.tracking_uri, _SYSTEM_SECONDS)
        self._client = client
        self._given_up = client is None  # said once
        self._settings = settings
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()
        self.id = run_id

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Logs figures at a step; they reach MLflow some seconds later, and at the end."""
        if self._given_up:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._send()

    def picture(self, name: str, picture: Image, step: int) -> None:
        """Logs a picture at a step, beside the figures of its name."""
        if self._given_up:
            return
        with self._carrying_on():
            self._client.log_image(self.id, picture, key=name, step=step)

    def made(self, sha256: str, versions: dict[str, str]) -> None:
        """Marks the run with the adapter that came of it, by which registration finds it, on whatever machine.

        Tried even where MLflow did not answer while training went on.

        Args:
            versions: of this machine's libraries.
        """
        if self._client is None:
            return
        from mlflow.entities import RunTag

        with self._carrying_on("the adapter gets another run when it is registered"):
            self._client.log_batch(self.id, tags=[RunTag(k, v) for k, v in ({"sha256": sha256} | versions).items()])

    def end(self, status: str) -> None:
        """Logs what still waits and closes the run."""
        if self._monitor is not None:
            self._monitor.finish()
        if not self._given_up:
            self._send(status)

    def _send(self, status: str | None = None) -> None:
        with self._carrying_on():
            for start in range(0, len(self._waiting), 1000):  # MLflow's limit for one request
                self._client.log_batch(self.id, metrics=self._waiting[start : start + 1000])
            if status:
                self._client.set_terminated(self.id, status)
        self._waiting, self._flushed = [], time.monotonic()

    @contextlib.contextmanager
    def _carrying_on(self, consequence: str = "training goes on without it") -> Iterator[None]:
        assert self._settings is not None
        try:
            with reaching(self._settings, consequence):
                yield
        except UserError as error:
            note(f"warning: {error}")
            self._given_up = True


@contextlib.contextmanager
def tracking(
    settings: Registry | None, model: str, params: dict[str, Any], scratch: Path | None = None
) -> Iterator[Run]:
    """Yields the run to log a distillation to, and ends it as finished or failed.

    Where MLflow cannot be reached this is said once on standard error, training goes on and `run.id` is None; the
    adapter gets its run when it is registered. Else `run.made` ties the run to the adapter.

    Args:
        settings: None logs nothing.
        params: settings of the run, nested or flat.
        scratch: where the run's id is kept while it lasts, so that a resumed distillation continues the same run.
    """
    run = Run(None, None, settings)
    if settings is not None:
        try:
            with reaching(settings, "training goes on without it, and the adapter gets its run when it is registered"):
                client = connect(settings)
                run = Run(client, _continue_or_create(client, settings, model, params, scratch), settings)
        except UserError as error:
            note(f"warning: {error}")
    try:
        yield run
    except BaseException as error:
        run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.end("FINISHED")


def _continue_or_create(
    client: Any, settings: Registry, model: str, params: dict[str, Any], scratch: Path | None
) -> str:
    marker = scratch / _RUN_FILE if scratch else None
    if marker and marker.is_file():
        run_id = existing(client, as_object(read_json(marker), str(marker)).get("run_id"))
        if run_id:
            client.update_run(run_id, status="RUNNING")
            return run_id
    run_id = create_run(client, settings, model, params)
    if marker:
        write_json(marker, {"run_id": run_id})
    return run_id


def create_run(
    client: Any, settings: Registry, model: str, params: dict[str, Any], tags: dict[str, str] | None = None
) -> str:
    """Returns the id of a new run in the configured experiment, which is made where there is none."""
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(settings.experiment)
    try:
        identity = experiment.experiment_id if experiment else client.create_experiment(settings.experiment)
    except MlflowException as error:  # another run made it at the same moment
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        identity = client.get_experiment_by_name(settings.experiment).experiment_id
    run_id: str = client.create_run(identity, run_name=model, tags={"model": model, **(tags or {})}).info.run_id
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flat(params).items()])
    return run_id


def existing(client: Any, run_id: str | None) -> str | None:
    """Returns the run's id if this server knows it and it was not deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        # A name that can be no run's is refused as such by a server.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def connect(settings: Registry) -> Any:
    """Returns an MLflow client of the configured server; reaching a database is tried first, once."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)

    # Creating the first database prints a line for each of its sixty migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    uri = settings.tracking_uri
    if re.match(r"(sqlite|postgresql|mysql|mssql)\b", uri):
        # MLflow tries an unreachable database for 100 seconds.
        from sqlalchemy import create_engine, make_url

        database = make_url(uri).database
        if uri.startswith("sqlite") and database:
            Path(database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(uri)
        engine.connect().close()
        engine.dispose()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def reaching(settings: Registry, consequence: str) -> Iterator[None]:
    """Turns what MLflow and its transports raise into one line with the tracking URI and what follows.

    Raises:
        Unavailable: the server or the database did not answer, or was busy.
        UserError: it did, and refuses.
    """
    try:
        yield
    except Exception as error:
        known = {"mlflow", "sqlalchemy", "psycopg2", "requests", "urllib3", "boto3", "botocore"}
        foreign = {cls.__module__.partition(".")[0] for cls in type(error).__mro__} & known
        if not foreign and not isinstance(error, OSError | ImportError):
            raise
        uri = settings.tracking_uri
        told = masking.text(error, uri)
        reason = (told or type(error).__name__).splitlines()[0][:300]
        if getattr(error, "get_http_status_code", lambda: 0)() == 401:
            reason = "it asks for a name and a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            reason += " (`source .up/environment` knows those of `make up`)"
        # The original message, which a log may print with the traceback, can hold the address as it is.
        cause = error if _is_clean(error, uri) else None
        kind = Unavailable if _is_passing(error) else UserError
        raise kind(f"MLflow at {masking.address(uri)}: {reason}; {consequence}") from cause


def _is_clean(error: BaseException | None, uri: str) -> bool:
    """Returns whether neither the error nor what it came of has a secret in its text."""
    while error is not None:
        if masking.text(error, uri) != str(error):
            return False
        error = error.__cause__ or error.__context__
    return True


def _is_passing(error: BaseException | None) -> bool:
    """Returns whether the same call may succeed later, by the error or by what it came of.

    MLflow wraps what its transport raised, and a database's driver says by its text alone what went wrong.
    """
    while error is not None:
        names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
        if isinstance(error, ConnectionError | TimeoutError) or names & _TRANSPORT:
            return True
        if "sqlalchemy.OperationalError" in names:
            return not re.search(r"authentication failed|does not exist|unable to open|[Aa]ccess denied", str(error))
        status = getattr(error, "get_http_status_code", lambda: 0)() if "mlflow.RestException" in names else 0
        if status in _BUSY:
            return True
        error = error.__cause__ or error.__context__
    return False


def page(settings: Registry, run_id: str) -> str | None:
    """Returns the address of a run in the server's pages; None where there is no server, or it does not answer."""
    if not settings.tracking_uri.startswith("http"):
        return None
    try:
        with reaching(settings, "no link to the run"):
            experiment = connect(settings).get_run(run_id).info.experiment_id
    except UserError:
        return None
    address = masking.address(re.sub(r"://\S*@", "://", settings.tracking_uri)).partition("?")[0].rstrip("/")
    return f"{address}/#/experiments/{experiment}/runs/{run_id}"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings under dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
