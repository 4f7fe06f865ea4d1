"""Downloading the release of a version, or the part of it that drawing needs, and checking it."""

from __future__ import annotations

import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lcmlora.config import Registry
from lcmlora.errors import NotFound, UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.io import terminal
from lcmlora.io.files import make_once, temporary_folder
from lcmlora.io.parsing import read_json
from lcmlora.io.private import downloads
from lcmlora.io.terminal import note
from lcmlora.registry.downloads import offline
from lcmlora.registry.lookup import RELEASE, Version, canonical, resolve
from lcmlora.registry.servers import artifacts
from lcmlora.registry.tracking import connect, of_environment, reaching
from lcmlora.releases import bundle
from lcmlora.releases.trust import records

if TYPE_CHECKING:
    from mlflow import MlflowClient


def pull(
    reference: str, settings: Registry | None = None, out: Path | None = None, *, everything: bool = False
) -> Path:
    """Downloads the adapter of a version to a folder, checks every file, and returns the folder.

    The folder has the weights, the scheduler's settings, the provenance and the checksums. It
    appears whole or not at all, however many processes ask for it. The weights must have the SHA-256 that the registry
    knows.

    Args:
        settings: of the registry; MLFLOW_TRACKING_URI names it by default.
        out: by default a folder in the user's cache ($LCMLORA_CACHE, or lcmlora in $XDG_CACHE_HOME or ~/.cache), which
            is downloaded once, and again if it is damaged.
        everything: download the whole release, with card, report and the weights under their name for ComfyUI.

    Raises:
        UserError: a file is missing or differs from its checksum, `out` exists and is something else, no registry was
            named, or MLflow cannot be reached.
    """
    settings = settings or of_environment()
    version = resolve(reference, settings)
    if out is not None:
        return _pulled(version, settings, out, everything)
    return pull_to_cache(version, settings, downloads("adapters"), [canonical(reference)], everything=everything)


def pull_to_cache(
    version: Version, settings: Registry, cache: Path, names: list[str], *, everything: bool = False
) -> Path:
    """Returns the folder in a cache with the adapter of a version, which is downloaded unless it is there and whole.

    Args:
        names: by which it was looked up, and is found without the registry (`offline`).
        everything: as for `pull`.

    Raises:
        UserError: as for `pull`.
    """
    _refuse_foreign(version)
    out = cache / f"sha256-{version.sha256[:12]}{'-all' if everything else ''}"
    folder = _pulled(version, settings, out, everything, again=True)
    if not offline.is_asked_for():
        digests = dict.fromkeys((version.sha256, version.trained))
        offline.remember(cache, settings, [*names, version.reference, *digests], version.plain())
    return folder


def _pulled(version: Version, settings: Registry, out: Path, everything: bool, *, again: bool = False) -> Path:
    """Downloads a version to `out`, unless it is there.

    Args:
        again: download it again where it is damaged.
    """
    _refuse_foreign(version)
    checked = None if everything else bundle.ADAPTER_FILES

    def is_there() -> bool:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
        try:
            if not (out / bundle.CHECKSUMS).is_file() or bundle.digest(out) != version.sha256:
                raise UserError(f"{out}: exists; expected a new folder, an empty one, or a download of this adapter")
            bundle.verify(out, checked)
        except UserError as error:
            if not again:
                raise
            note(f"note: {error}; it is downloaded again")
            return False
        return True

    def download(folder: Path) -> None:
        if offline.is_asked_for():
            raise UserError(f"{version.reference}: is not in {out.parent}, and {offline.VARIABLE} is set")
        with reaching(settings, "ask again later"):
            _download(connect(settings), version, settings, folder, everything)

    try:
        make_once(out, is_there, download)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was kept") from error
    return out


def verify(folder: Path, settings: Registry | None = None) -> Version:
    """Checks every file of a download against its SHA256SUMS, and its weights against the registry.

    Args:
        folder: a release, or the part of it that `pull` downloads.
        settings: of the registry; MLFLOW_TRACKING_URI names it by default.

    Returns:
        The newest version with these weights.

    Raises:
        UserError: a file is missing or differs, no version has these weights, no registry was named, or MLflow cannot
            be reached.
    """
    listed = set(bundle.checksums(folder))
    bundle.verify(folder, bundle.ADAPTER_FILES if any(not (folder / name).is_file() for name in listed) else None)
    try:
        return resolve(bundle.digest(folder), settings)
    except NotFound as error:
        raise UserError(f"{folder}: {error}") from None


def _download(client: MlflowClient, version: Version, settings: Registry, folder: Path, everything: bool) -> None:
    """Downloads the release of a version, or the part of it that drawing needs, and checks it."""
    artifacts.check_run(client, version.run_id, settings, reading=True)
    listed = [PurePosixPath(item.path).name for item in client.list_artifacts(version.run_id, RELEASE)]
    if not listed:
        raise UserError(f"{version.reference}: has no release among the artifacts of its run {version.run_id}")
    for name in listed:
        if fault := bundle.fault_of_name(name):
            raise UserError(f"{version.reference}: {terminal.shown(repr(name))} among its artifacts {fault}")
    for name in sorted(listed) if everything else bundle.ADAPTER_FILES:
        _fetch(client, version, name, folder)
    bundle.verify(folder, None if everything else bundle.ADAPTER_FILES)
    found = bundle.digest(folder)
    if found != version.sha256:
        raise UserError(
            f"{version.reference}: {bundle.WEIGHTS} has sha256 {found[:12]}..., the registry says "
            f"{version.sha256[:12]}...; nothing was kept"
        )


def _fetch(client: MlflowClient, version: Version, name: str, folder: Path) -> Path:
    """Downloads one file of a version's release into the folder and returns its path."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        try:
            path = Path(client.download_artifacts(version.run_id, f"{RELEASE}/{name}", temporary))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                raise
            raise UserError(f"{version.reference}: has no {name} among its artifacts") from error
        return path.replace(folder / name)


def figures(version: Version, settings: Registry) -> Metrics:
    """Returns the metrics.json of a version's release.

    Raises:
        UserError: the version has no release, its file cannot be read, or MLflow cannot be reached.
    """
    _refuse_foreign(version)
    place = f"{version.reference}: {bundle.METRICS} among its artifacts"
    with reaching(settings, "ask again later"), temporary_folder() as folder:
        client = connect(settings)
        artifacts.check_run(client, version.run_id, settings, reading=True)
        path = _fetch(client, version, bundle.METRICS, Path(folder))
        try:
            found = read_json(path)
        except UserError as error:
            raise UserError(f"{place}: {str(error).removeprefix(f'{path}: ')}") from None
    return Metrics.parse(found, place)


def _refuse_foreign(version: Version) -> None:
    """Raises UserError where lcmlora did not register the version."""
    if not version.run_id:
        raise UserError(f"{version.reference}: has no run, so no release; it was registered by other means")
    if not records.is_digest(version.sha256):
        shown = f"its tag sha256 is {terminal.shown(repr(version.sha256))}" if version.sha256 else "has no tag sha256"
        raise UserError(
            f"{version.reference}: {shown}, expected the SHA-256 of an adapter; it was registered by other means"
        )
