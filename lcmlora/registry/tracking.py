"""Logging a distillation to an MLflow run, and reaching MLflow's server or database.

Every call names its tracking server. The only process-wide state are defaults of MLflow's environment variables.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lcmlora import extras, masking
from lcmlora.config import Registry
from lcmlora.errors import Unavailable, UserError
from lcmlora.inference.mlflow_internals import start_system_monitor
from lcmlora.io.files import write_json
from lcmlora.io.parsing import as_object, read_json
from lcmlora.io.terminal import CELL, note, shortened
from lcmlora.registry.servers import answers, artifacts, terminal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric
    from PIL.Image import Image

Settings = Mapping[str, object]  # nested or flat, as MLflow's params show them

TRACKING_URI = "MLFLOW_TRACKING_URI"  # environment

_FLUSH_SECONDS = 5.0
_SYSTEM_SECONDS = 10.0  # between two measurements of the machine
_RUN_FILE = "mlflow_run.json"  # in a distillation's scratch folder, so that a resumed one continues its run

# Set before MLflow is imported. With its own defaults it retries for minutes where nothing listens.
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
    """An MLflow run to which figures are logged in batches. Without a client it logs nothing."""

    def __init__(self, client: MlflowClient | None, run_id: str | None, settings: Registry | None) -> None:
        self._monitor = None
        if run_id and settings and settings.system_metrics:
            self._monitor = start_system_monitor(run_id, settings.tracking_uri, _SYSTEM_SECONDS)
        self._client = client
        self._given_up = client is None  # after the first failure, which is printed
        self._settings = settings
        self._waiting: list[Metric] = []
        self._flushed = time.monotonic()
        self.id = run_id

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Logs figures at a step. They are sent some seconds later, or at the end."""
        if self._given_up:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._send()

    def picture(self, name: str, picture: Image, step: int) -> None:
        """Logs a picture at a step under a name."""
        if self._given_up or self._client is None:
            return
        with self._tolerating_failure():
            self._client.log_image(self.id, picture, key=name, step=step)

    def tag_adapter(self, sha256: str, versions: dict[str, str]) -> None:
        """Tags the run with the SHA-256 of its adapter. By this tag, registration on any machine finds the run.

        It is tried even if MLflow did not answer during training.

        Args:
            versions: of this machine's libraries.
        """
        if self._client is None:
            return
        from mlflow.entities import RunTag

        with self._tolerating_failure("the adapter gets another run when it is registered"):
            self._client.log_batch(self.id, tags=[RunTag(k, v) for k, v in ({"sha256": sha256} | versions).items()])

    def end(self, status: str) -> None:
        """Sends the figures that still wait, and closes the run. `status`: FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            self._monitor.finish()
        if not self._given_up:
            self._send(status)

    def _send(self, status: str | None = None) -> None:
        assert self._client is not None
        with self._tolerating_failure():
            for start in range(0, len(self._waiting), 1000):  # MLflow's limit for one request
                self._client.log_batch(self.id, metrics=self._waiting[start : start + 1000])
            if status:
                self._client.set_terminated(self.id, status)
        self._waiting, self._flushed = [], time.monotonic()

    @contextlib.contextmanager
    def _tolerating_failure(self, consequence: str = "training goes on without it") -> Iterator[None]:
        """Turns an unreachable server into a warning. After it, nothing more is logged."""
        assert self._settings is not None
        try:
            with reaching(self._settings, consequence):
                yield
        except UserError as error:
            note(f"warning: {error}")
            self._given_up = True


@contextlib.contextmanager
def log_run(settings: Registry | None, model: str, params: Settings, scratch: Path | None = None) -> Iterator[Run]:
    """Yields the run to which a distillation is logged, and ends it as finished, failed or killed.

    If MLflow cannot be reached, a warning is printed, training goes on without a run (`run.id` is None), and the
    adapter gets its run when it is registered.

    Args:
        settings: None logs nothing.
        params: settings of the run, nested or flat.
        scratch: the folder that keeps the run's id, so that a resumed distillation continues the same run.
    """
    run = Run(None, None, settings)
    if settings is not None:
        consequence = "training goes on without it, and the adapter gets its run when it is registered"
        try:
            with reaching(settings, consequence):
                client = connect(settings)
                run = Run(client, _continue_or_create(client, settings, model, params, scratch), settings)
        except extras.MissingExtra as error:  # a machine that only trains needs no MLflow
            note(f"warning: {error}; {consequence}")
        except UserError as error:
            told = str(error).removesuffix(f"; {consequence}")  # which `reaching` adds, and other refusals do not
            note(f"warning: {told}; {consequence}")
    try:
        yield run
    except BaseException as error:
        run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.end("FINISHED")


def _continue_or_create(
    client: MlflowClient, settings: Registry, model: str, params: Settings, scratch: Path | None
) -> str:
    """Returns the id of the run that a killed distillation has left in `scratch`, else of a new one."""
    marker = scratch / _RUN_FILE if scratch else None
    if marker and marker.is_file():
        run_id = existing_run(client, as_object(read_json(marker), str(marker)).get("run_id"))
        if run_id:
            artifacts.check_run(client, run_id, settings)
            client.update_run(run_id, status="RUNNING")
            return run_id
    run_id = create_run(client, settings, model, params)
    if marker:
        write_json(marker, {"run_id": run_id})
    return run_id


def create_run(
    client: MlflowClient, settings: Registry, model: str, params: Settings, tags: dict[str, str] | None = None
) -> str:
    """Returns the id of a new run in the configured experiment. The experiment is made if there is none.

    Raises:
        UserError: it keeps artifacts where others cannot read them.
    """
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(settings.experiment)
    try:
        identity = experiment.experiment_id if experiment else client.create_experiment(settings.experiment)
    except MlflowException as error:  # another process has just made it
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        identity = client.get_experiment_by_name(settings.experiment).experiment_id
    _check_experiment(client.get_experiment(identity), settings)
    run_id: str = client.create_run(identity, run_name=model, tags={"model": model, **(tags or {})}).info.run_id
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flat_settings(params).items()])
    return run_id


def existing_run(client: MlflowClient, run_id: str | None) -> str | None:
    """Returns the run's id if this server has the run and it was not deleted, else None."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        # A server refuses a text that cannot be the id of a run.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def of_environment() -> Registry:
    """Returns the settings of the registry that MLFLOW_TRACKING_URI names.

    Raises:
        UserError: the variable is not set.
    """
    uri = os.environ.get(TRACKING_URI)
    if not uri:
        raise UserError(f"{TRACKING_URI}: is not set; set it to the address of MLflow, or name a project's settings")
    return Registry(tracking_uri=uri)


def connect(settings: Registry) -> MlflowClient:
    """Returns an MLflow client of the configured server or database.

    Raises:
        UserError: the server is too old or no MLflow, or this terminal does not know the servers of `lcmlora up`.
        Exception: of the driver, where a database cannot be reached; see `reaching`.
    """
    terminal.require_environment(settings)
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)

    # Creating the first database prints a line for each of its sixty migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    uri = settings.tracking_uri
    if re.match(r"(sqlite|postgresql|mysql|mssql)\b", uri):
        # One try here, since MLflow retries an unreachable database for 100 seconds.
        from sqlalchemy import create_engine, make_url

        database = make_url(uri).database
        if uri.startswith("sqlite") and database:
            Path(database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(uri)
        engine.connect().close()
        engine.dispose()
    elif uri.startswith("http"):
        answers.check_version(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check(settings: Registry) -> None:
    """Checks before hours of work that their results can be registered.

    Raises:
        UserError: MLflow answers, and is too old, or asks for a password, or keeps artifacts where others cannot read
            them, or this terminal does not know the servers of `lcmlora up`.
        Unavailable: it does not answer now.
    """
    with reaching(settings, "nothing can be registered now"):
        found = connect(settings).get_experiment_by_name(settings.experiment)
    if found is not None:
        _check_experiment(found, settings)


def _check_experiment(experiment: Experiment, settings: Registry) -> None:
    name = f"experiment {experiment.name}"
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow at {masking.address(settings.tracking_uri)}: {name} was deleted: restore it (mlflow experiments "
            f"restore --experiment-id {experiment.experiment_id}), or name another one (registry.experiment)"
        )
    artifacts.check_place(experiment.artifact_location or "", settings, name)


@contextlib.contextmanager
def reaching(settings: Registry, consequence: str) -> Iterator[None]:
    """Turns errors of MLflow and its transports into one line with the tracking URI and the consequence.

    Raises:
        Unavailable: the server or the database did not answer, or was busy.
        UserError: it answered, and refuses.
        MissingExtra: MLflow, or what it needs for this address, is not installed.
    """
    try:
        yield
    except Exception as error:
        if missing := extras.missing(error):  # no other call would find it
            raise missing from None
        known = {"mlflow", "sqlalchemy", "psycopg2", "requests", "urllib3", "boto3", "botocore", "google", "json"}
        foreign = {cls.__module__.partition(".")[0] for cls in type(error).__mro__} & known
        if not foreign and not isinstance(error, OSError | ImportError):
            raise
        uri = settings.tracking_uri
        message = masking.text(error, uri)
        reason = shortened((message or type(error).__name__).splitlines()[0], CELL)
        if getattr(error, "get_http_status_code", lambda: 0)() == 401:
            reason = "it asks for a name and a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            reason += " (`source .up/environment` sets those of `lcmlora up`)"
        elif uri.startswith("http") and is_forbidden(error):
            who = os.environ.get("MLFLOW_TRACKING_USERNAME") or "this user"
            reason = f"it does not permit this to {who}; its administrator may give the right (docs/guides/operate.md)"
        elif uri.startswith("http") and (answered := answers.fault(error)):
            reason, status = answered
            kind = Unavailable if status in _BUSY else UserError  # of a proxy, if the server behind it does not run
            raise kind(f"MLflow at {masking.address(uri)}: {reason}; {consequence}") from None
        # The original message can contain the address with its password, and a log may print it with the traceback.
        cause = error if _is_clean(error, uri) else None
        kind = Unavailable if _is_temporary(error) else UserError
        if isinstance(error, ImportError):  # such as the driver of a database
            consequence = "install it with pip"
        raise kind(f"MLflow at {masking.address(uri)}: {reason}; {consequence}") from cause


def is_forbidden(error: BaseException) -> bool:
    """Returns whether MLflow knows the user, and does not permit what was asked."""
    return int(getattr(error, "get_http_status_code", lambda: 0)()) == 403


def _is_clean(error: BaseException | None, uri: str) -> bool:
    """Returns whether neither the error nor its causes have a secret in their text."""
    while error is not None:
        if masking.text(error, uri) != str(error):
            return False
        error = error.__cause__ or error.__context__
    return True


def _is_temporary(error: BaseException | None) -> bool:
    """Returns whether the same call may succeed later, by the error and its causes.

    MLflow wraps its transport's errors, and a database's driver distinguishes errors only by their text.
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


def run_page(settings: Registry, run_id: str) -> str | None:
    """Returns the address of a run's page; None where there is no server, or it does not answer."""
    if not settings.tracking_uri.startswith("http"):
        return None
    try:
        with reaching(settings, "no link to the run"):
            experiment = connect(settings).get_run(run_id).info.experiment_id
    except UserError:
        return None
    address = masking.address(re.sub(r"://\S*@", "://", settings.tracking_uri)).partition("?")[0].rstrip("/")
    return f"{address}/#/experiments/{experiment}/runs/{run_id}"


def flat_settings(values: Settings, prefix: str = "") -> dict[str, object]:
    """Returns nested settings by their dotted names."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
