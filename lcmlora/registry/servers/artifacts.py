"""Where MLflow keeps the artifacts of runs, and whether others can read them there.

An experiment has its place from the first run on. A plain run without a server makes it a folder of this machine
(`mlruns`); a server gives it `mlflow-artifacts:/...`, which only its clients can read, or a bucket.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from lcmlora import masking
from lcmlora.config import Registry
from lcmlora.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def local_folder(uri: str) -> Path | None:
    """Returns the folder of a machine that an address of artifacts names, None where it is another place."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", uri):
        return Path(unquote(urlsplit(uri).path)) if uri.startswith("file:") else None
    return Path(uri)


def check_place(uri: str, settings: Registry, owner: str) -> None:
    """Raises UserError where artifacts at this address cannot be read by all who know the registry.

    Args:
        uri: the place of artifacts of a run or of an experiment.
        owner: whose they are, for the message.
    """
    at = masking.address(settings.tracking_uri)
    served = settings.tracking_uri.startswith("http")
    if served and (folder := local_folder(uri)) is not None:
        raise UserError(
            f"MLflow at {at}: {owner} keeps its artifacts in {folder}, which only one machine can read, as a run "
            "without a server made it or the server has no --artifacts-destination: `lcmlora up` on that machine "
            "moves them to its server; else name another experiment (registry.experiment)"
        )
    if not served and uri.startswith("mlflow-artifacts:"):
        raise UserError(
            f"MLflow at {at}: {owner} keeps its artifacts on an MLflow server, and this is its database: set "
            "MLFLOW_TRACKING_URI to the server (that of `lcmlora up`: `source .up/environment`)"
        )


def check_run(client: MlflowClient, run_id: str, settings: Registry, *, reading: bool = False) -> None:
    """Raises UserError where the artifacts of a run cannot be read by all who know the registry.

    Args:
        reading: it is enough that they can be read here.
    """
    from mlflow.exceptions import MlflowException

    try:
        uri = client.get_run(run_id).info.artifact_uri or ""
    except MlflowException as error:
        # Other programs may register a version with any text as its run, whose artifacts are then asked for in vain.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return
    folder = local_folder(uri)
    if not (reading and folder is not None and folder.is_dir()):
        check_place(uri, settings, f"run {run_id}")


def listed(client: MlflowClient, run_id: str, path: str) -> Iterator[tuple[str, int]]:
    """Yields path and bytes of every file of a run below a folder, as the server lists them."""
    for item in client.list_artifacts(run_id, path):
        if item.is_dir:
            yield from listed(client, run_id, item.path)
        else:
            yield item.path, int(item.file_size or 0)


def check_uploaded(client: MlflowClient, run_id: str, path: str, folder: Path) -> None:
    """Raises UserError where the server does not list every file of a folder, with its size, after it was uploaded."""
    found = dict(listed(client, run_id, path))
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = f"{path}/{file.relative_to(folder).as_posix()}"
        if found.get(name) != (size := file.stat().st_size):
            shown = f"{found[name]} bytes" if name in found else "nothing"
            raise UserError(f"run {run_id}: {name}: expected {size} bytes among its artifacts, MLflow lists {shown}")
