"""MLflow's registry: the versions `lcm-lora-<model>` and what production asks of them.

A version is an MLflow model that serves (lcmlora/serving.py), with the release among its artifacts.
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora import events, release
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.evaluation.gate import record
from lcmlora.files import atomic_folder
from lcmlora.tracking import connect, create_run, existing, flat, reaching, shown

if TYPE_CHECKING:
    from lcmlora.pipelines import Pipeline

PASSED, REJECTED = "passed", "rejected"

_MODEL = "model"  # where a run has its MLflow model
_RELEASE = f"{_MODEL}/artifacts/release"
_PREVIEW = "preview.png"
_PREVIEW_WIDTH = 800  # pixels: MLflow's page shows pictures as they are, and cuts what does not fit


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
    tags: dict[str, str]

    @property
    def reference(self) -> str:
        return f"{self.name}/{self.version}"

    def figure(self, name: str) -> float | None:
        """Returns a figure by its name, with or without the features that it is named after."""
        found = (value for key, value in self.metrics.items() if key == name or key.endswith(f"/{name}"))
        return next(found, None)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Registered:
    """What `register` made or found."""

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
    release as artifacts of its run, the metrics as the run's figures, the data as its input, and tags that say where it
    comes from. One that failed the gate is a version too, `rejected`.

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
    with reaching(settings, f"the release is kept in {folder} and the next run registers it"):
        client = connect(settings)
        found = _with_digest(client, sha256, name)
        if found:
            version = found[0]
            _update(client, version, tags)
        else:
            known = existing(client, run_id)
            run_id = known or _run_for(client, settings, model, provenance)
            _log(client, run_id, provenance, figures, tags)
            _upload(client, run_id, folder, name)
            _create_model(client, name)
            version = client.create_model_version(
                name,
                f"runs:/{run_id}/{_MODEL}",
                run_id,
                tags=tags | dict([events.tag("registered"), events.tag(tags["gate"], reason=tags.get("gate_reason"))]),
                description=_description(figures, provenance, run_id),
            )
            version = _only_one(client, version, sha256, own_run=known is None)
        aliases = read_aliases(client, name)
        past = events.read(int(version.version), client.get_model_version(name, version.version).tags)
    return Registered(
        name=name,
        version=int(version.version),
        sha256=sha256,
        created=not found,
        aliases=tuple(sorted(alias for alias, number in aliases.items() if number == int(version.version))),
        promoted=any(event.alias == settings.alias for event in past),
    )


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
        names = [name] if name else sorted(model.name for model in search(client.search_registered_models))
        found = []
        for each in names:
            own = search(client.search_model_versions, f"name = '{each}'")
            if name and not own:
                raise UserError(f"{name}: not registered at {shown(settings.tracking_uri)}")
            found += sorted(own, key=lambda version: -int(version.version))
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


def figures(version: Version, settings: Registry) -> dict[str, Any]:
    """Returns the release's metrics.json of a version.

    Raises:
        UserError: the version has no release, or MLflow cannot be reached.
    """
    if not version.run_id:
        raise UserError(f"{version.reference}: has no run, so no release; it was registered by other means")
    with reaching(settings, "ask again later"), tempfile.TemporaryDirectory() as folder:
        path = _fetch(connect(settings), version, release.METRICS, Path(folder))
        return dict(json.loads(path.read_text(encoding="utf-8")))


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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if (out / release.CHECKSUMS).is_file() and release.digest(out) == version.sha256:
            release.verify(out, None if everything else release.ADAPTER)
            return out
        raise UserError(f"{out}: is in the way; expected no such folder, an empty one or this very adapter")
    try:
        with reaching(settings, "ask again later"), atomic_folder(out) as folder:
            _download(connect(settings), version, folder, everything)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was kept") from error
    return out


def load_pipeline(
    reference: str,
    device: str = "auto",
    *,
    settings: Registry | None = None,
    base: Path | None = None,
    cache: Path = Path("scratch", "adapters"),
) -> Pipeline:
    """Returns a pipeline that draws with the adapter of a version: verified, on its pinned base, its scheduler set.

    Args:
        settings: by default those of params.yaml in the current folder.
        base: the folder of the base, where it is not the one that the adapter names.
        cache: where the adapter is kept; it is downloaded once.
    """
    from lcmlora import config, pipelines

    settings = settings or config.load().registry
    version = resolve(reference, settings)
    folder = pull(version.reference, settings, cache / f"sha256-{version.sha256[:12]}")
    return pipelines.load(folder, base, device)


# --- registering --------------------------------------------------------------------------------------------------


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
        "data_dvc": provenance.get("data_dvc"),
        "git_commit": provenance["git"]["commit"],
        "dvc_lock": provenance.get("dvc_lock"),
        "objective": provenance["params"]["distill"]["objective"],
        "features": figures["features"]["name"],
        "release_uri": uri,
        "gate": REJECTED if gate_failures else PASSED,
        "gate_reason": "; ".join(gate_failures),
    }
    return {key: str(value) for key, value in tags.items() if value}


def _update(client: Any, version: Any, tags: dict[str, str]) -> None:
    """Writes the tags that changed; a gate that decides otherwise than before is an event."""
    name, number = version.name, version.version
    for key in sorted(tags.keys() | ({"gate_reason"} & version.tags.keys())):
        if version.tags.get(key) != tags.get(key, ""):
            client.set_model_version_tag(name, number, key, tags.get(key, ""))
    if version.tags.get("gate") != tags["gate"]:
        key, event = events.tag(tags["gate"], reason=tags.get("gate_reason"))
        client.set_model_version_tag(name, number, key, event)


def _run_for(client: Any, settings: Registry, model: str, provenance: dict[str, Any]) -> str:
    """Returns a run for an adapter whose own is not known here: one that a killed registration left, or a new one."""
    sha256 = provenance["sha256"]
    experiment = client.get_experiment_by_name(settings.experiment)
    left = client.search_runs([experiment.experiment_id], f"tags.sha256 = '{sha256}'") if experiment else []
    if left:
        return str(left[0].info.run_id)
    return create_run(client, settings, model, provenance["params"]["distill"], {"sha256": sha256})


def _log(client: Any, run_id: str, provenance: dict[str, Any], figures: dict[str, Any], tags: dict[str, str]) -> None:
    """Logs the figures, the settings of all stages and the data as the run's input."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in record(figures).items()]
    settled = client.get_run(run_id).data.params
    params = {key: str(value)[:6000] for key, value in flat(provenance["params"]).items()}
    # Those of the distillation are there without a prefix, and a param cannot be changed.
    new = [Param(k, v) for k, v in params.items() if not k.startswith("distill.") and k not in settled]
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    for start in range(0, len(metrics), 1000):  # MLflow's limits for one request
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])
    digest = provenance.get("data_dvc") or provenance["data_digest"][:36]
    source = json.dumps({"path": "data/pictures", "latents": provenance["data_digest"]})
    data = Dataset("data/pictures", digest, "dvc" if provenance.get("data_dvc") else "local", source)
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def _upload(client: Any, run_id: str, folder: Path, name: str) -> None:
    from PIL import Image

    from lcmlora import serving

    with tempfile.TemporaryDirectory() as temporary:
        serving.write_model(Path(temporary, _MODEL), model=name)
        client.log_artifacts(run_id, str(Path(temporary, _MODEL)), _MODEL)
    client.log_artifacts(run_id, str(folder), _RELEASE)
    with Image.open(folder / "grid.png") as grid:
        side = (_PREVIEW_WIDTH, max(1, round(grid.height * _PREVIEW_WIDTH / grid.width)))
        client.log_image(run_id, grid.convert("RGB").resize(side, Image.Resampling.LANCZOS), _PREVIEW)


def _only_one(client: Any, version: Any, sha256: str, *, own_run: bool) -> Any:
    """Returns the version of this adapter: of two that were registered at the same moment, the first.

    Args:
        own_run: the version's run was made for it, and ends here.
    """
    first = _with_digest(client, sha256, version.name)[0]
    lost = int(first.version) != int(version.version)
    if lost:
        client.delete_model_version(version.name, version.version)
    if own_run:
        client.set_terminated(version.run_id)
        if lost and first.run_id != version.run_id:
            client.delete_run(version.run_id)
    return first


def _create_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _description(figures: dict[str, Any], provenance: dict[str, Any], run_id: str) -> str:
    """Returns Markdown for MLflow's page of the version: figures, and grid and report from the run's artifacts."""
    rows = []
    students = sorted((n for n in figures["excess"] if n.startswith("student@")), key=lambda n: int(n[8:]))
    for name in students:
        cost, excess, retrieval = (figures[k][name] for k in ("network_evaluations", "excess", "retrieval"))
        rows.append(f"| {name} | {cost} | {excess:.1f} | {retrieval:.3f} |")
    artifact = f"get-artifact?run_uuid={run_id}&path"
    return "\n".join(
        [
            f"Acceleration adapter of `{provenance['base']['source']}`, objective "
            f"{provenance['params']['distill']['objective']}, "
            f"features {figures['features']['name']}, {figures['pictures']} pictures, seed {figures['seed']}.",
            "",
            "| drawn with | network evaluations | excess distance to the teacher | caption retrieval |",
            "|---|---|---|---|",
            *rows,
            "",
            f"[The whole report]({artifact}={_RELEASE}/{release.REPORT}), which the run's artifacts show as a page.",
            "",
            f"![grid]({artifact}={_PREVIEW})",
        ]
    )


def _download(client: Any, version: Version, folder: Path, everything: bool) -> None:
    """Writes the release of a version, or what `pull` takes of it, to the folder, and checks it."""
    listed = {Path(item.path).name: item.file_size for item in client.list_artifacts(version.run_id, _RELEASE)}
    if not listed:
        raise UserError(f"{version.reference}: has no release among the artifacts of its run {version.run_id}")
    for name in sorted(listed) if everything else release.ADAPTER:
        _fetch(client, version, name, folder)
    release.verify(folder, None if everything else release.ADAPTER)
    found = release.digest(folder)
    if found != version.sha256:
        raise UserError(
            f"{version.reference}: {release.WEIGHTS} has sha256 {found[:12]}..., the registry says "
            f"{version.sha256[:12]}...; nothing was kept"
        )


def _fetch(client: Any, version: Version, name: str, folder: Path) -> Path:
    """Downloads one file of a version's release into the folder and returns its path."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        try:
            path = Path(client.download_artifacts(version.run_id, f"{_RELEASE}/{name}", temporary))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                raise
            raise UserError(f"{version.reference}: has no {name} among its artifacts") from error
        return path.replace(folder / name)


# --- finding ------------------------------------------------------------------------------------------------------


def find(client: Any, reference: str, settings: Registry) -> Any:
    """Returns MLflow's entity of the version that a reference names; see `resolve`."""
    if re.fullmatch(r"[0-9a-f]{12,64}", reference):
        found = _with_digest(client, reference)
        if not found:
            raise UserError(f"{reference}: no adapter of this SHA-256 at {shown(settings.tracking_uri)}")
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
        raise UserError(f"{reference}: not registered at {shown(settings.tracking_uri)}")
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
        raise UserError(f"{name}/{version}: not registered at {shown(settings.tracking_uri)}") from error


def _is_registered(client: Any, name: str) -> bool:
    return bool(client.search_registered_models(f"name = '{name}'", max_results=1))


def _with_digest(client: Any, sha256: str, name: str | None = None) -> list[Any]:
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
    # Numbers from a database, text from a server; and search_model_versions leaves the aliases out.
    return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}


def _described(client: Any, found: Sequence[Any], settings: Registry) -> list[Version]:
    """Returns the versions with aliases and figures, which take a request for each model and for 100 runs."""
    aliases = {name: read_aliases(client, name) for name in {version.name for version in found}}
    metrics = _metrics(client, sorted({version.run_id for version in found if version.run_id}))
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
                run_id=version.run_id,
                aliases=tuple(sorted(a for a, v in aliases[version.name].items() if v == number)),
                created=_iso(version.creation_timestamp),
                updated=_iso(version.last_updated_timestamp),
                promoted=promotions[-1] if promotions else None,
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


def _iso(milliseconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
