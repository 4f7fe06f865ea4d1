"""MLflow's registry: the versions `lcm-lora-<model>` and what production asks of them.

A version is an MLflow model that serves (lcmlora/inference/serving.py), with the release among its artifacts.
"""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lcmlora import masking
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.io import terminal
from lcmlora.io.files import make_once, temporary_folder
from lcmlora.io.parsing import read_json
from lcmlora.io.private import downloads
from lcmlora.project import Project
from lcmlora.registry import events
from lcmlora.registry.tracking import connect, reaching
from lcmlora.releases import bundle
from lcmlora.releases.trust import records

if TYPE_CHECKING:
    from lcmlora.inference.pipelines import Pipeline

PASSED, REJECTED = "passed", "rejected"

MODEL = "model"  # where a run has its MLflow model
RELEASE = f"{MODEL}/artifacts/release"


@dataclass(frozen=True)
class Version:
    """A version of a registered model, and all that is known of its adapter."""

    name: str
    version: int
    sha256: str
    base: dict[str, str | None]  # source, revision, digest
    objective: str
    features: str
    metrics: dict[str, float]  # flat, as MLflow has them
    data_digest: str
    data_dvc: str | None  # DVC's digest of the captioned pictures
    git_commit: str | None
    dvc_lock: str | None  # SHA-256 of dvc.lock
    gate: str  # passed or rejected
    gate_reason: str | None
    release_uri: str | None
    run_id: str
    aliases: tuple[str, ...]
    created: str  # ISO 8601, UTC
    updated: str
    promoted: str | None  # when it got the configured alias last
    foreign_events: tuple[str, ...]  # tags that are called like events and that others wrote: passed over
    tags: dict[str, str]

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"

    def figure(self, name: str) -> float | None:
        """Returns a figure by its name, with or without the features that it is named after."""
        found = (value for key, value in self.metrics.items() if key == name or key.endswith(f"/{name}"))
        return next(found, None)

    def plain(self) -> dict[str, Any]:
        """Returns all that is known, as JSON can hold it."""
        return asdict(self)


def resolve(reference: str, settings: Registry) -> Version:
    """Returns what is known of `lcm-lora-emoji@champion`, `lcm-lora-emoji/3`, or an adapter's SHA-256.

    Args:
        reference: of a SHA-256 the first twelve digits do; its newest version is meant.

    Raises:
        UserError: it does not exist, or MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        client = connect(settings)
        version = find(client, reference, settings)
        return _described(client, [version], settings)[0]


def champion(model: str, settings: Registry) -> Version | None:
    """Returns the version of `lcm-lora-<model>` that has the configured alias, None where none has.

    Raises:
        UserError: MLflow cannot be reached.
    """
    name = f"lcm-lora-{model}"
    with reaching(settings, "ask again later"):
        client = connect(settings)
        number = read_aliases(client, name).get(settings.alias) if _is_registered(client, name) else None
        return None if number is None else _described(client, [_get(client, name, number, settings)], settings)[0]


def versions(settings: Registry, name: str | None = None) -> list[Version]:
    """Returns all versions, of one model or of all, the newest first.

    Raises:
        UserError: there is no such model, or MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        client = connect(settings)
        found = search(client.search_model_versions, f"name = '{name}'" if name else None)
        if name and not found:
            raise UserError(f"{name}: not registered at {masking.address(settings.tracking_uri)}")
        found.sort(key=lambda version: (version.name, -int(version.version)))
        return _described(client, found, settings)


@dataclass(frozen=True)
class Difference:
    """A figure of two versions; None where one of them lacks it."""

    figure: str
    first: float | str | None
    second: float | str | None

    @property
    def change(self) -> float | None:
        """Returns second - first, of numbers."""
        if isinstance(self.first, float) and isinstance(self.second, float):
            return self.second - self.first
        return None


def compare(first: Version, second: Version) -> list[Difference]:
    """Returns what two versions are and how well they draw, figure by figure; where they come from goes first."""
    facts = ("sha256", "objective", "features", "data_digest", "data_dvc", "git_commit", "dvc_lock", "gate")
    rows = [Difference(name, getattr(first, name), getattr(second, name)) for name in facts]
    rows += [Difference(f"base {key}", first.base[key], second.base[key]) for key in first.base]
    names = dict.fromkeys([*first.metrics, *second.metrics])
    return rows + [Difference(name, first.metrics.get(name), second.metrics.get(name)) for name in names]


def condition(text: str) -> Callable[[Version], bool]:
    """Returns the test that `KEY=VALUE` (a field or a tag), `FIGURE<NUMBER` or `FIGURE>NUMBER` stands for.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(.+?)\s*([=<>])\s*(.+?)\s*", text)
    if match is None:
        raise UserError(f"{text!r}: expected KEY=VALUE, FIGURE<NUMBER or FIGURE>NUMBER")
    key, sign, wanted = match.groups()
    if sign == "=":
        return lambda version: str(version.plain().get(key, version.tags.get(key))) == wanted
    try:
        limit = float(wanted)
    except ValueError:
        raise UserError(f"{text!r}: {wanted!r} is not a number") from None

    def test(version: Version) -> bool:
        value = version.figure(key)
        return value is not None and (value < limit if sign == "<" else value > limit)

    return test


def figures(version: Version, settings: Registry) -> Metrics:
    """Returns the release's metrics.json of a version.

    Raises:
        UserError: the version has no release or one with other contents, or MLflow cannot be reached.
    """
    _expect_ours(version)
    place = f"{version.reference}: {bundle.METRICS} among its artifacts"
    with reaching(settings, "ask again later"), temporary_folder() as folder:
        path = _fetch(connect(settings), version, bundle.METRICS, Path(folder))
        try:
            found = read_json(path)
        except UserError as error:
            raise UserError(f"{place}: {str(error).removeprefix(f'{path}: ')}") from None
    return Metrics.parse(found, place)


def _expect_ours(version: Version) -> None:
    if not version.run_id:
        raise UserError(f"{version.reference}: has no run, so no release; it was registered by other means")
    if not records.is_digest(version.sha256):
        shown = f"its tag sha256 is {terminal.shown(repr(version.sha256))}" if version.sha256 else "has no tag sha256"
        raise UserError(
            f"{version.reference}: {shown}, expected the SHA-256 of an adapter; it was registered by other means"
        )


def pull(reference: str, settings: Registry, out: Path, *, everything: bool = False) -> Path:
    """Downloads the adapter of a version to the folder `out`, checks every file, and returns the folder.

    That is the weights in diffusers' format with the scheduler's settings, the provenance and the checksums; the folder
    appears whole or not at all. The weights must have the SHA-256 that the registry knows.

    Args:
        everything: the whole release, with card, report and the file for ComfyUI and A1111.

    Raises:
        UserError: a file is missing or another one, `out` is in the way, or MLflow cannot be reached.
    """
    version = resolve(reference, settings)
    _expect_ours(version)

    def is_there() -> bool:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return False
        if not (out / bundle.CHECKSUMS).is_file() or bundle.digest(out) != version.sha256:
            raise UserError(f"{out}: is in the way; expected no such folder, an empty one or this very adapter")
        bundle.verify(out, None if everything else bundle.ADAPTER)
        return True

    def download(folder: Path) -> None:
        with reaching(settings, "ask again later"):
            _download(connect(settings), version, folder, everything)

    try:
        make_once(out, is_there, download)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was kept") from error
    return out


def load_pipeline(
    reference: str,
    device: str = "auto",
    *,
    project: Path = Path(),
    settings: Registry | None = None,
    base: Path | None = None,
    cache: Path | None = None,
) -> Pipeline:
    """Returns a pipeline that draws with the adapter of a version: verified, on its pinned base, its scheduler set.

    Args:
        project: the project's folder. Its params.yaml says where the registry is, and a base that the adapter names by
            a relative path lies there.
        settings: of the registry, where they are not those of the project.
        base: the folder of the base, where it is not the one that the adapter names.
        cache: where the adapter is kept, which is downloaded once; by default $LCMLORA_CACHE/adapters or
            ~/.cache/lcmlora/adapters.
    """
    from lcmlora.inference import pipelines

    settings = settings or Project(project).settings().registry
    cache = cache or downloads("adapters")
    version = resolve(reference, settings)
    _expect_ours(version)
    folder = pull(version.reference, settings, cache / f"sha256-{version.sha256[:12]}")
    return pipelines.load(folder, base, device, sources=project)


def _download(client: Any, version: Version, folder: Path, everything: bool) -> None:
    """Writes the release of a version, or what `pull` takes of it, to the folder, and checks it."""
    listed = [PurePosixPath(item.path).name for item in client.list_artifacts(version.run_id, RELEASE)]
    if not listed:
        raise UserError(f"{version.reference}: has no release among the artifacts of its run {version.run_id}")
    for name in listed:
        if fault := bundle.fault_of_name(name):
            raise UserError(f"{version.reference}: {terminal.shown(repr(name))} among its artifacts {fault}")
    for name in sorted(listed) if everything else bundle.ADAPTER:
        _fetch(client, version, name, folder)
    bundle.verify(folder, None if everything else bundle.ADAPTER)
    found = bundle.digest(folder)
    if found != version.sha256:
        raise UserError(
            f"{version.reference}: {bundle.WEIGHTS} has sha256 {found[:12]}..., the registry says "
            f"{version.sha256[:12]}...; nothing was kept"
        )


def _fetch(client: Any, version: Version, name: str, folder: Path) -> Path:
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


# --- finding ------------------------------------------------------------------------------------------------------


def find(client: Any, reference: str, settings: Registry) -> Any:
    """Returns MLflow's entity of the version that a reference names; see `resolve`."""
    if re.fullmatch(r"[0-9a-f]{12,64}", reference):
        found = with_digest(client, reference)
        if not found:
            raise UserError(f"{reference}: no adapter of this SHA-256 at {masking.address(settings.tracking_uri)}")
        return found[-1]
    match = re.fullmatch(r"([^@/]+)(?:@([^@/]+)|/(\d+))", reference.removeprefix("models:/"))
    if match is None:
        raise UserError(
            f"{reference!r}: expected MODEL@ALIAS, MODEL/VERSION or the SHA-256 of an adapter, such as "
            "lcm-lora-emoji@champion"
        )
    name, alias, number = match.groups()
    if alias is None:
        return _get(client, name, int(number), settings)
    aliases = read_aliases(client, name) if _is_registered(client, name) else None
    if aliases is None:
        raise UserError(f"{reference}: not registered at {masking.address(settings.tracking_uri)}")
    if alias not in aliases:
        raise UserError(f"{reference}: no such alias; {name} has {', '.join(sorted(aliases)) or 'none'}")
    return _get(client, name, aliases[alias], settings)


def _get(client: Any, name: str, version: int, settings: Registry) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{name}/{version}: not registered at {masking.address(settings.tracking_uri)}") from error


def _is_registered(client: Any, name: str) -> bool:
    return bool(client.search_registered_models(f"name = '{name}'", max_results=1))


def with_digest(client: Any, sha256: str, name: str | None = None) -> list[Any]:
    """Returns the versions with this digest, or one that begins so, the oldest first."""
    condition = f"tags.sha256 = '{sha256}'" if len(sha256) == 64 else f"tags.sha256 LIKE '{sha256}%'"
    own = f"name = '{name}' and {condition}" if name else condition
    return sorted(search(client.search_model_versions, own), key=lambda version: int(version.version))


def search(method: Any, condition: str | None = None) -> list[Any]:
    """Returns all answers of one of the client's search methods, which gives them in pages."""
    page = method(condition, max_results=1000)
    found = list(page)
    while page.token:
        page = method(condition, max_results=1000, page_token=page.token)
        found += page
    return found


def read_aliases(client: Any, name: str) -> dict[str, int]:
    return _aliases(client.get_registered_model(name))


def _aliases(model: Any) -> dict[str, int]:
    # Numbers from a database, text from a server; and search_model_versions leaves the aliases out.
    return {alias: int(number) for alias, number in model.aliases.items()}


def _described(client: Any, found: Sequence[Any], settings: Registry) -> list[Version]:
    """Returns the versions with aliases and figures, which take a request for 1,000 models and for 100 runs."""
    names = {version.name for version in found}
    if len(names) > 1:  # one question about all models, where one for each would be the longest part of a list
        aliases = {model.name: _aliases(model) for model in search(client.search_registered_models)}
    else:
        aliases = {name: read_aliases(client, name) for name in names}
    # Whoever registers a version may name any text as its run.
    runs = {version.run_id for version in found if re.fullmatch(r"[0-9a-f]{32}", version.run_id or "")}
    metrics = _metrics(client, sorted(runs))
    described = []
    for version in found:
        tags, number = dict(version.tags), int(version.version)
        past = events.read(number, tags)
        promotions = [event.time for event in past if event.alias == settings.alias]
        described.append(
            Version(
                name=version.name,
                version=number,
                sha256=tags.get("sha256", ""),
                base={
                    "source": tags.get("base"),
                    "revision": tags.get("base_revision"),
                    "digest": tags.get("base_digest"),
                    # Versions from before 2026-11 have no such tag, and their digest is the UNet's.
                    **({"unet": tags["base_unet"]} if "base_unet" in tags else {}),
                },
                objective=tags.get("objective", ""),
                features=tags.get("features", ""),
                metrics=metrics.get(version.run_id, {}),
                data_digest=tags.get("data_digest", ""),
                data_dvc=tags.get("data_dvc"),
                git_commit=tags.get("git_commit"),
                dvc_lock=tags.get("dvc_lock"),
                gate=tags.get("gate", ""),
                gate_reason=tags.get("gate_reason") or None,
                release_uri=tags.get("release_uri"),
                run_id=version.run_id or "",
                aliases=tuple(sorted(a for a, v in aliases.get(version.name, {}).items() if v == number)),
                created=_iso(version.creation_timestamp),
                updated=_iso(version.last_updated_timestamp),
                promoted=promotions[-1] if promotions else None,
                foreign_events=tuple(events.foreign(tags)),
                tags=tags,
            )
        )
    return described


def _metrics(client: Any, run_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found: dict[str, dict[str, float]] = {}
    for start in range(0, len(run_ids), 100):
        listed = ", ".join(f"'{run_id}'" for run_id in run_ids[start : start + 100])
        for run in client.search_runs(experiments, f"attributes.run_id IN ({listed})", max_results=100):
            found[run.info.run_id] = dict(run.data.metrics)
    return found


def _iso(milliseconds: int | None) -> str:
    if milliseconds is None:
        return ""
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
