"""Registering a release as a version of `lcm-lora-<model>` in MLflow. Calls may be killed, repeated or concurrent."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcmlora.config import Registry
from lcmlora.dvc_files.stage_records import RAN_WITH
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.gate import record
from lcmlora.io.files import temporary_folder
from lcmlora.io.parsing import Malformed, as_object, parse_json
from lcmlora.io.terminal import note
from lcmlora.registry import events, lookup
from lcmlora.registry.approval.standing import Standing, standing
from lcmlora.registry.listing import main_figures
from lcmlora.registry.lookup import MODEL, PASSED, PREFIX, REJECTED, RELEASE, read_aliases, versions_of_release
from lcmlora.registry.retention import plan, tombstones
from lcmlora.registry.servers import artifacts, ledger
from lcmlora.registry.tracking import connect, create_run, existing_run, flat_settings, reaching
from lcmlora.releases import bundle
from lcmlora.releases.bundle import Provenance

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PREVIEW = "preview.png"  # the contact sheet among a run's artifacts
_OF_TRAINING = {"git_commit", "git_dirty", "lcmlora"}  # tags of a version
_PREVIEW_WIDTH = 800  # pixels; MLflow's page does not scale pictures, and cuts wider ones off


@dataclass(frozen=True)
class Registered:
    """The version of a release, as `register_release` made or found it."""

    name: str
    version: int
    sha256: str
    run_id: str
    created: bool  # by this call
    aliases: tuple[str, ...]
    promoted: bool  # has had the configured alias at some time, perhaps not now
    approval: Standing | None = None  # what a person said, or since when one is asked
    deleted: bool = False  # the adapter had this version, which a person deleted, and was not registered again


def register_release(
    model: str,
    settings: Registry,
    folder: Path,
    uri: str | None = None,
    gate_failures: Sequence[str] = (),
    others: Sequence[str | None] = (),
) -> Registered:
    """Registers the release in `folder` as a version of `lcm-lora-<model>`. A release is registered only once.

    If there is a version with the SHA-256 of its weights, only tags that changed are written. Else a new version is
    made: the release becomes artifacts of its run, the metrics its figures, the data its input, and tags say where it
    comes from. A release that failed the gate becomes a version, too, with the tag `rejected`. The run is that of the
    distillation, on whatever machine it was, which has the SHA-256 of the trained adapter as a tag
    (`tracking.Run.tag_adapter`). If there is no such run, a new one is made.

    An adapter whose version a person deleted in MLflow is not registered again (`ledger`), until `readmit` is called.

    Args:
        uri: the address at which the release is published, if it is.
        gate_failures: why the gate was not passed; empty if it was.
        others: its addresses in further stores; None for one where it was not published.

    Raises:
        UserError: MLflow cannot be reached. The release is kept, and the next run registers it.
    """
    bundle.verify(folder)
    sha256 = bundle.digest(folder)
    name = f"lcm-lora-{model}"
    provenance = Provenance.read(folder / bundle.PROVENANCE)
    figures = Metrics.read(folder / bundle.METRICS)
    tags = _tags(provenance, figures, uri, gate_failures) | _all_addresses((uri, *others))
    with reaching(settings, f"the release is kept in {folder} and the next run registers it"):
        client = connect(settings)
        same = [v for v in versions_of_release(client, sha256, name) if tombstones.MARK not in v.tags]
        if not same and (number := _entered(client, settings, name, provenance)):
            same = _edited(client, name, number, provenance.trained)
            if not same:
                return Registered(name, number, sha256, "", created=False, aliases=(), promoted=True, deleted=True)
        found = _with_release(client, same, settings) or _uploaded_again(client, same, folder, name, provenance)
        if found:
            version = found[0]
            _update(client, version, _known_here(tags, version, provenance) | main_figures.tag(record(figures)))
        else:
            version = _create_version(client, settings, name, folder, provenance, figures, tags)
        number = int(version.version)
        ledger.enter(client, name, number, sha256, provenance.trained, version.run_id)
        aliases = read_aliases(client, name)
        own = [client.get_model_version(name, version.version), *(each for each in same if each not in found)]
        pruned = tombstones.with_digits(tombstones.read(dict(client.get_registered_model(name).tags)), sha256)
    return Registered(
        name=name,
        version=number,
        sha256=sha256,
        run_id=version.run_id,
        created=not found,
        aliases=tuple(sorted(alias for alias, each in aliases.items() if each == number)),
        promoted=_was_promoted(own, settings.alias, aliases.get(settings.alias))
        or (pruned is not None and pruned.promoted),
        approval=standing(events.read_events(number, own[0].tags), settings.alias),
    )


def _create_version(
    client: MlflowClient,
    settings: Registry,
    name: str,
    folder: Path,
    provenance: Provenance,
    figures: Metrics,
    tags: dict[str, str],
) -> ModelVersion:
    """Uploads a release and returns its new version, or that of another call that was faster."""
    run_id, ended = _run_of(client, settings, name, provenance)
    artifacts.check_run(client, run_id, settings)
    if not _knows_training(provenance):
        tags = tags | _of_training(client.get_run(run_id).data.tags.get(RAN_WITH))
    _log(client, run_id, provenance, figures, tags)
    _upload(client, run_id, folder, name, provenance)
    _create_model(client, name)
    happened = [events.event_tag("registered"), events.event_tag(tags["gate"], reason=tags.get("gate_reason"))]
    version = client.create_model_version(
        name,
        f"runs:/{run_id}/{MODEL}",
        run_id,
        tags=tags | main_figures.tag(record(figures)) | dict([*happened, events.last_tag()]),
        description=_description(figures, provenance, run_id),
    )
    return _remove_duplicate(client, version, provenance.sha256, settings, own_run=not ended)


def _entered(client: MlflowClient, settings: Registry, name: str, provenance: Provenance) -> int | None:
    """Returns the version that an adapter had, which is not found by its tags. Raises NotFound for a renamed model."""
    ledger.refuse_renamed(client, name)
    return ledger.deleted_version(client, name, provenance.sha256, provenance.trained, settings.experiment)


def _known_here(tags: Mapping[str, str], version: ModelVersion, provenance: Provenance) -> dict[str, str]:
    """Returns the tags without those that only the machine knows which has trained the adapter, and has written."""
    kept = set() if _knows_training(provenance) else _OF_TRAINING & version.tags.keys()
    return {key: value for key, value in tags.items() if key not in kept}


def _edited(client: MlflowClient, name: str, number: int, trained: str) -> list[ModelVersion]:
    """Returns the version of an adapter whose tags a person has edited; none where the version was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    run_id = existing_run(client, version.run_id or None)
    # After a model was deleted whole, its numbers are given to other adapters.
    return [version] if run_id and client.get_run(run_id).data.tags.get("sha256") == trained else []


def _uploaded_again(
    client: MlflowClient, same: Sequence[ModelVersion], folder: Path, name: str, provenance: Provenance
) -> list[ModelVersion]:
    """Uploads the release to the run of the newest version of this adapter that has lost it, and returns the version.

    None where the runs of all of them were deleted.
    """
    for version in reversed(same):
        run_id = existing_run(client, version.run_id or None)
        if run_id and client.get_run(run_id).data.tags.get("sha256") == provenance.trained:
            note(f"note: {name}/{version.version}: its artifacts were gone and are uploaded again")
            _upload(client, run_id, folder, name, provenance)
            return [version]
    return []


def _was_promoted(own: Sequence[ModelVersion], alias: str, champion: int | None) -> bool:
    """Returns whether the first of these versions, all of one adapter, must not be promoted by a flow.

    That is if one of them has had the alias: if none has it now, a person has rolled back. If one without a release has
    it, the first version takes its place.
    """
    if any(int(version.version) == champion for version in own[1:]):
        return False
    past = (event for version in own for event in events.read_events(int(version.version), version.tags))
    return any(event.alias == alias for event in past)


def readmit(model: str, settings: Registry, folder: Path) -> str:
    """Lets the adapter of the release in `folder` be registered again, whose version was deleted in MLflow.

    Returns:
        NAME/VERSION of the deleted version.

    Raises:
        UserError: the adapter is registered, or never was, or MLflow cannot be reached.
    """
    name, provenance = f"lcm-lora-{model}", Provenance.read(folder / bundle.PROVENANCE)
    with reaching(settings, "nothing was changed"):
        client = connect(settings)
        number = _entered(client, settings, name, provenance)
        if number is None or _edited(client, name, number, provenance.trained):
            raise UserError(f"{folder}: no version of its adapter was deleted, so there is nothing to readmit")
        ledger.forget(client, name, provenance.sha256, provenance.trained, settings.experiment)
    return f"{name}/{number}"


def _knows_training(provenance: Provenance) -> bool:
    """Returns whether the adapter was trained on the machine that packaged it, which has a record of it."""
    return "distill" in (provenance.stages or {})


def _of_training(summary: str | None) -> dict[str, str]:
    """Returns the tags of what an adapter was trained with, from the tag of its run; none where it has none."""
    try:
        found = as_object(parse_json(summary or "{}"), RAN_WITH)
    except (Malformed, UserError):  # anybody may write a tag
        return {}
    values = {"git_commit": found.get("commit"), "git_dirty": found.get("dirty"), "lcmlora": found.get("lcmlora")}
    return {
        key: str(value).lower() if key == "git_dirty" else str(value)
        for key, value in values.items()
        if value is not None
    }


def _with_release(client: MlflowClient, found: Sequence[ModelVersion], settings: Registry) -> list[ModelVersion]:
    """Returns the versions whose run exists and has a release, and that are not being pruned.

    Versions of other programs have no release.
    """

    def has_release(version: ModelVersion) -> bool:
        if tombstones.MARK in version.tags:
            return False
        run_id = existing_run(client, version.run_id or None)
        if run_id is None:
            return False
        artifacts.check_run(client, run_id, settings)  # what cannot be read here is not missing
        listed = client.list_artifacts(run_id, RELEASE)
        return any(item.path.endswith(f"/{bundle.CHECKSUMS}") for item in listed)

    return [version for version in found if has_release(version)]


def _all_addresses(uris: Sequence[str | None]) -> dict[str, str]:
    """Returns the tag with the addresses in all stores; none where there is one store."""
    published = [uri for uri in uris if uri] if len(uris) > 1 else []
    return {lookup.URIS: json.dumps(published)} if published else {}


def _tags(provenance: Provenance, figures: Metrics, uri: str | None, gate_failures: Sequence[str]) -> dict[str, str]:
    base = provenance.base
    tags = {
        "sha256": provenance.sha256,
        "adapter": provenance.adapter,
        "base": base["source"],
        "base_revision": base.get("revision"),
        "base_digest": base["digest"],
        "base_unet": base.get("unet"),
        "data_digest": provenance.data_digest,
        "data_dvc": provenance.data_dvc,
        "git_commit": provenance.git.commit,
        "git_dirty": None if provenance.git.dirty is None else str(provenance.git.dirty).lower(),
        "lcmlora": (provenance.versions or {}).get("lcmlora"),
        "dvc_lock": provenance.dvc_lock,
        "objective": provenance.params.distill.objective,
        "features": figures.features.name,
        "release_uri": uri,
        "gate": REJECTED if gate_failures else PASSED,
        "gate_reason": "; ".join(gate_failures),
    }
    return {key: str(value) for key, value in tags.items() if value}


def _update(client: MlflowClient, version: ModelVersion, tags: dict[str, str]) -> None:
    """Writes the tags that changed. If the gate's decision changed, an event is added.

    A release that is published where others can read it keeps this address, although a copy is published on this
    machine.
    """
    name, number = version.name, version.version
    if lookup.URIS in tags:  # it stays published in a store that failed this time
        known = [*lookup.read_uris(tags), *lookup.read_uris(version.tags)]
        tags = tags | {lookup.URIS: json.dumps(list(dict.fromkeys(known)))}
    published, offered = version.tags.get("release_uri"), tags.get("release_uri")
    if published and offered and offered.startswith("file:") and not published.startswith("file:"):
        tags = tags | {"release_uri": published}
        note(f"note: {name}/{number}: its release stays {published}; {offered} is on this machine alone")
    for key in sorted(tags.keys() | ({"gate_reason"} & version.tags.keys())):
        if version.tags.get(key) != tags.get(key, ""):
            client.set_model_version_tag(name, number, key, tags.get(key, ""))
    if version.tags.get("gate") != tags["gate"]:
        events.write(client, name, int(number), tags["gate"], reason=tags.get("gate_reason"))


def _run_of(client: MlflowClient, settings: Registry, name: str, provenance: Provenance) -> tuple[str, bool]:
    """Returns the id of the adapter's run, and whether it has ended.

    It is the last distillation with this adapter, or the run of a registration that was killed, or a new run.
    """
    sha256 = provenance.trained
    experiment = client.get_experiment_by_name(settings.experiment)
    found = (
        client.search_runs(
            [experiment.experiment_id],
            f"tags.sha256 = '{sha256}'",
            max_results=100,
            order_by=["attributes.start_time DESC"],
        )
        if experiment
        else []
    )
    found = [run for run in found if tombstones.MARK not in run.data.tags]
    if found:
        return str(found[0].info.run_id), found[0].info.status != "RUNNING"
    model, params = name.removeprefix(PREFIX), provenance.params.distill.plain()
    return create_run(client, settings, model, params, {"sha256": sha256}), False


def _log(client: MlflowClient, run_id: str, provenance: Provenance, figures: Metrics, tags: dict[str, str]) -> None:
    """Logs the tags, the figures, the settings of all stages, and the data as the run's input."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in record(figures).items()]
    logged = client.get_run(run_id).data.params
    params = {key: str(value)[:6000] for key, value in flat_settings(provenance.params.plain()).items()}
    # The run has those of the distillation already, without a prefix. A param cannot be changed.
    new = [Param(k, v) for k, v in params.items() if not k.startswith("distill.") and k not in logged]
    # A run has the digest of the adapter as it was trained, by which another registration finds it.
    tags = tags | {"sha256": provenance.trained}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    for start in range(0, len(metrics), 1000):  # MLflow's limits for one request
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    for start in range(0, len(new), 100):
        client.log_batch(run_id, params=new[start : start + 100])
    digest = provenance.data_dvc or provenance.data_digest[:36]
    source = json.dumps({"path": provenance.pictures, "latents": provenance.data_digest})
    data = Dataset(provenance.pictures, digest, "dvc" if provenance.data_dvc else "local", source)
    inputs = [DatasetInput(data, [InputTag("mlflow.data.context", "training")])]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException as error:
        # If two calls log the same new data set at once, the database refuses one of them. A second try succeeds.
        if error.error_code != "BAD_REQUEST":
            raise
        client.log_inputs(run_id, inputs)


def _upload(client: MlflowClient, run_id: str, folder: Path, name: str, provenance: Provenance) -> None:
    """Uploads the MLflow model, the release inside it, and the contact sheet for MLflow's page."""
    from PIL import Image

    from lcmlora.inference import serving

    with temporary_folder() as temporary:
        made = Path(temporary, MODEL)
        serving.write_model(made, model=name, base=provenance.base, steps=provenance.recommended_steps)
        client.log_artifacts(run_id, str(made), MODEL)
        size = _bytes(Path(temporary)) + _bytes(folder)
    client.log_artifacts(run_id, str(folder), RELEASE)
    artifacts.check_uploaded(client, run_id, RELEASE, folder)
    client.set_tag(run_id, plan.BYTES, str(size))  # a server says it only folder by folder
    with Image.open(folder / "grid.png") as grid:
        side = (_PREVIEW_WIDTH, max(1, round(grid.height * _PREVIEW_WIDTH / grid.width)))
        client.log_image(run_id, grid.convert("RGB").resize(side, Image.Resampling.LANCZOS), PREVIEW)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove_duplicate(
    client: MlflowClient, version: ModelVersion, sha256: str, settings: Registry, *, own_run: bool
) -> ModelVersion:
    """Returns the first version of this release. If another call has registered one before, `version` is deleted.

    Args:
        own_run: the version's run was made for it, and ends here.
    """
    first = _with_release(client, versions_of_release(client, sha256, version.name), settings)[0]
    duplicate = int(first.version) != int(version.version)
    if duplicate:
        client.delete_model_version(version.name, version.version)
    if own_run:
        client.set_terminated(version.run_id)
        if duplicate and first.run_id != version.run_id:
            client.delete_run(version.run_id)
    return first


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _description(figures: Metrics, provenance: Provenance, run_id: str) -> str:
    """Returns Markdown for MLflow's page of the version: figures, and the contact sheet and report in the artifacts."""
    rows = []
    for key in figures.students:
        cost, excess, retrieval = figures.network_evaluations[key], figures.excess[key], figures.retrieval[key]
        rows.append(f"| {key} | {cost} | {excess:.1f} | {retrieval:.3f} |")
    artifact = f"get-artifact?run_uuid={run_id}&path"
    return "\n".join(
        [
            f"Acceleration adapter of `{provenance.base['source']}`, objective "
            f"{provenance.params.distill.objective}, "
            f"features {figures.features.name}, {figures.pictures} pictures, seed {figures.seed}.",
            "",
            "| drawn with | network evaluations | excess distance to the teacher | caption retrieval |",
            "|---|---|---|---|",
            *rows,
            "",
            f"[The whole report]({artifact}={RELEASE}/{bundle.REPORT}), which the run's artifacts show as a page.",
            "",
            f"![grid]({artifact}={PREVIEW})",
        ]
    )
