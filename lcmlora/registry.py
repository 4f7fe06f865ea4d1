"""MLflow: the run of a distillation, and the registered versions `lcm-lora-<model>` with their tags and aliases.

Every call names the tracking server it talks to; no process-wide state is set but MLflow's own environment defaults.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora import release
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.evaluation.gate import record

if TYPE_CHECKING:
    from PIL.Image import Image

_FLUSH_SECONDS = 5.0
_RUN_FILE = "mlflow_run.json"  # in the scratch folder of a distillation: a resumed one continues its run
_PROMOTED = "promoted_to"
_ARTIFACTS = "release"  # where a run has its release

# Set before MLflow is imported. Its own defaults retry for minutes where nothing listens.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class Run:
    """One MLflow run that figures are logged to, in batches. Without a client it keeps nothing."""

    def __init__(self, client: Any, run_id: str | None, settings: Registry | None) -> None:
        self._client = client
        self._settings = settings
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()
        self.id = run_id

    @property
    def reference(self) -> dict[str, Any]:
        """What names this run to a later reader; without credentials."""
        return {
            "run_id": self.id,
            "tracking_uri": self._settings and _shown(self._settings.tracking_uri),
            "experiment": self._settings and self._settings.experiment,
        }

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Logs figures at a step; they reach MLflow some seconds later, and at the end."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in metrics.items()]
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._send()

    def picture(self, name: str, picture: Image, step: int) -> None:
        """Logs a picture at a step, beside the figures of its name."""
        if self._client is None:
            return
        with self._carrying_on():
            self._client.log_image(self.id, picture, key=name, step=step)

    def end(self, status: str) -> None:
        """Logs what still waits and closes the run."""
        if self._client is not None:
            self._send(status)

    def _send(self, status: str | None = None) -> None:
        with self._carrying_on():
            for start in range(0, len(self._waiting), 1000):  # MLflow's limit for one request
                self._client.log_batch(self.id, metrics=self._waiting[start : start + 1000])
            if status:
                self._client.set_terminated(self.id, status)
        self._waiting, self._flushed = [], time.monotonic()

    @contextlib.contextmanager
    def _carrying_on(self) -> Iterator[None]:
        assert self._settings is not None
        try:
            with _reaching(self._settings, "training goes on without it"):
                yield
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            self._client = None  # said once


@contextlib.contextmanager
def tracking(
    settings: Registry | None, model: str, params: dict[str, Any], scratch: Path | None = None
) -> Iterator[Run]:
    """Yields the run to log a distillation to, and ends it as finished or failed.

    Where MLflow cannot be reached this is said once on standard error, training goes on and `run.id` is None; the
    adapter gets its run when it is registered.

    Args:
        settings: None logs nothing.
        params: settings of the run, nested or flat.
        scratch: where the run's id is kept while it lasts, so that a resumed distillation continues the same run.
    """
    run = Run(None, None, settings)
    if settings is not None:
        try:
            with _reaching(settings, "training goes on without it, and the adapter gets its run when it is registered"):
                client = _client(settings)
                run = Run(client, _continue_or_create(client, settings, model, params, scratch), settings)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
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
        run_id = _existing(client, json.loads(marker.read_text())["run_id"])
        if run_id:
            client.update_run(run_id, status="RUNNING")
            return run_id
    run_id = _create_run(client, settings, model, params)
    if marker:
        marker.write_text(json.dumps({"run_id": run_id}))
    return run_id


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    sha256: str
    created: bool  # by this call
    aliases: tuple[str, ...]
    promoted: bool  # it has carried the configured alias at some time, perhaps not now


def register(
    model: str,
    settings: Registry,
    folder: Path,
    run_id: str | None = None,
    uri: str | None = None,
    gate_failures: Sequence[str] = (),
) -> Registered:
    """Registers the release in `folder` as a version of `lcm-lora-<model>`; an adapter is registered once.

    A version with the adapter's SHA-256 is found again, and only tags that changed are written. A new one gets the
    release as artifacts of its run, the metrics as the run's figures, and tags that say where it comes from.

    Args:
        run_id: the distillation's run; a new run is made where MLflow does not know it (restored from another machine).
        uri: where the release was published, if it was.

    Raises:
        UserError: MLflow cannot be reached. The release is kept and the next run registers it.
    """
    release.verify(folder)
    sha256 = release.digest(folder)
    name = f"lcm-lora-{model}"
    provenance = json.loads((folder / release.PROVENANCE).read_text(encoding="utf-8"))
    figures = json.loads((folder / release.METRICS).read_text(encoding="utf-8"))
    tags = _tags(provenance, figures, uri, gate_failures)
    with _reaching(settings, f"the release is kept in {folder} and the next run registers it"):
        client = _client(settings)
        found = client.search_model_versions(f"name = '{name}' and tags.sha256 = '{sha256}'")
        if found:
            version = max(found, key=lambda v: int(v.version))
            for key in sorted(tags.keys() | ({"gate_reason"} & version.tags.keys())):
                if version.tags.get(key) != tags.get(key, ""):
                    client.set_model_version_tag(name, version.version, key, tags.get(key, ""))
        else:
            run_id = _existing(client, run_id) or _create_run(client, settings, model, provenance["params"]["distill"])
            _log_figures(client, run_id, figures, tags)
            client.log_artifacts(run_id, str(folder), _ARTIFACTS)
            _create_model(client, name)
            version = client.create_model_version(name, f"runs:/{run_id}/{_ARTIFACTS}", run_id, tags=tags)
        aliases = _aliases(client, name)
    return Registered(
        name=name,
        version=int(version.version),
        sha256=sha256,
        created=not found,
        aliases=tuple(sorted(alias for alias, number in aliases.items() if number == int(version.version))),
        promoted=settings.alias in version.tags.get(_PROMOTED, "").split(","),
    )


def promote(model: str, version: int, settings: Registry, alias: str | None = None) -> str:
    """Moves the alias (default: the configured one) to this version and returns the version's reference.

    That it was promoted is kept as a tag: a later run then knows that an alias which points elsewhere was moved by a
    person.
    """
    name, alias = f"lcm-lora-{model}", alias or settings.alias
    with _reaching(settings, "the version is registered; run again to promote it"):
        client = _client(settings)
        tags = client.get_model_version(name, str(version)).tags
        if _aliases(client, name).get(alias) != version:
            client.set_registered_model_alias(name, alias, str(version))
        promoted = set(filter(None, tags.get(_PROMOTED, "").split(",")))
        if alias not in promoted:
            client.set_model_version_tag(name, str(version), _PROMOTED, ",".join(sorted(promoted | {alias})))
    return f"{name}@{alias}"


def resolve(reference: str, settings: Registry) -> dict[str, Any]:
    """Returns what is known of `lcm-lora-emoji@champion` or `lcm-lora-emoji/3`: version, run, tags, figures, aliases.

    Raises:
        UserError: it does not exist, or MLflow cannot be reached.
    """
    match = re.fullmatch(r"([^@/]+)(?:@([^@/]+)|/(\d+))", reference)
    if match is None:
        raise UserError(f"{reference!r}: expected MODEL@ALIAS or MODEL/VERSION, such as lcm-lora-emoji@champion")
    name, alias, number = match.groups()
    with _reaching(settings, "ask again later"):
        client = _client(settings)
        from mlflow.exceptions import MlflowException

        try:
            aliases = _aliases(client, name)
            if alias and alias not in aliases:
                raise UserError(f"{reference}: no such alias; {name} has {', '.join(sorted(aliases)) or 'none'}")
            version = client.get_model_version(name, str(aliases[alias]) if alias else number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(f"{reference}: not registered at {_shown(settings.tracking_uri)}") from error
        metrics = client.get_run(version.run_id).data.metrics
    return {
        "name": name,
        "version": int(version.version),
        "aliases": sorted(a for a, v in aliases.items() if v == int(version.version)),
        "run_id": version.run_id,
        "source": version.source,
        "tags": dict(version.tags),
        "metrics": dict(metrics),
    }


def download(version: dict[str, Any], settings: Registry, folder: Path) -> None:
    """Writes the release of a version that `resolve` found to the folder.

    Raises:
        UserError: the version has no release, or MLflow cannot be reached.
    """
    shown = f"{version['name']}/{version['version']}"
    with _reaching(settings, "ask again later"):
        client = _client(settings)
        if not client.list_artifacts(version["run_id"], _ARTIFACTS):
            raise UserError(f"{shown}: has no release among the artifacts of its run {version['run_id']}")
        downloaded = Path(client.download_artifacts(version["run_id"], _ARTIFACTS, str(folder)))
    for path in downloaded.iterdir():
        path.replace(folder / path.name)
    downloaded.rmdir()


def _tags(
    provenance: dict[str, Any], figures: dict[str, Any], uri: str | None, gate_failures: Sequence[str]
) -> dict[str, str]:
    base = provenance["base"]
    tags = {
        "sha256": provenance["sha256"],
        "base": base["source"],
        "base_revision": base["revision"],
        "base_digest": base["digest"],
        "data_digest": provenance["data_digest"],
        "git_commit": provenance["git"]["commit"],
        "objective": provenance["params"]["distill"]["objective"],
        "features": figures["features"]["name"],
        "release_uri": uri,
        "gate": "failed" if gate_failures else "passed",
        "gate_reason": "; ".join(gate_failures),
    }
    return {key: str(value) for key, value in tags.items() if value}


def _client(settings: Registry) -> Any:
    """Returns an MLflow client of the configured server; reaching a database is tried first, once."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import logging

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
def _reaching(settings: Registry, consequence: str) -> Iterator[None]:
    """Turns what MLflow and its transports raise into one line with the tracking URI and what follows."""
    try:
        yield
    except Exception as error:
        known = {"mlflow", "sqlalchemy", "requests", "urllib3", "boto3", "botocore"}
        foreign = {cls.__module__.partition(".")[0] for cls in type(error).__mro__} & known
        if not foreign and not isinstance(error, OSError | ImportError):
            raise
        shown = _shown(settings.tracking_uri)
        reason = (str(error).replace(settings.tracking_uri, shown) or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"MLflow at {shown}: {reason}; {consequence}") from error


def _shown(uri: str) -> str:
    """Returns the address without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def _aliases(client: Any, name: str) -> dict[str, int]:
    # Numbers from a database, text from a server; and search_model_versions leaves the aliases out.
    return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}


def _existing(client: Any, run_id: str | None) -> str | None:
    """Returns the run's id if this server knows it and it was not deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def _create_run(client: Any, settings: Registry, model: str, params: dict[str, Any]) -> str:
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(settings.experiment)
    try:
        identity = experiment.experiment_id if experiment else client.create_experiment(settings.experiment)
    except MlflowException as error:  # another run made it at the same moment
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        identity = client.get_experiment_by_name(settings.experiment).experiment_id
    run_id: str = client.create_run(identity, run_name=model, tags={"model": model}).info.run_id
    client.log_batch(run_id, params=[Param(key, str(value)) for key, value in _flat(params).items()])
    return run_id


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _log_figures(client: Any, run_id: str, figures: dict[str, Any], tags: dict[str, str]) -> None:
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in record(figures).items()]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
