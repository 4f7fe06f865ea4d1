"""Registering a release as a version of `lcm-lora-<model>` in MLflow. Calls may be killed, repeated or concurrent."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcmlora.config import Registry
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.gate import record
from lcmlora.io.files import temporary_folder
from lcmlora.registry import events, lookup
from lcmlora.registry.approval.standing import Standing, standing
from lcmlora.registry.lookup import MODEL, PASSED, REJECTED, RELEASE, read_aliases, versions_of_release
from lcmlora.registry.tracking import connect, create_run, existing_run, flat_settings, reaching
from lcmlora.releases import bundle
from lcmlora.releases.bundle import Provenance

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PREVIEW = "preview.png"  # the contact sheet among a run's artifacts
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
    (`tracking.Run.tag_adapter`).
    If there is no such run, a new one is made.

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
    tags = _tags(provenance, figures, uri, gate_failures)
    if published := [each for each in (uri, *others) if each] if others else []:
        tags[lookup.URIS] = json.dumps(published)
    with reaching(settings, f"the release is kept in {folder} and the next run registers it"):
        client = connect(settings)
        found = _with_release(client, versions_of_release(client, sha256, name))
        if found:
            version = found[0]
            _update(client, version, tags)
        else:
            run_id, ended = _run_of(client, settings, model, provenance)
            _log(client, run_id, provenance, figures, tags)
            _upload(client, run_id, folder, name, provenance)
            _create_model(client, name)
            version = client.create_model_version(
                name,
                f"runs:/{run_id}/{MODEL}",
                run_id,
                tags=tags | dict([events.event_tag("registered"), _gate_event(tags)]),
                description=_description(figures, provenance, run_id),
            )
            version = _remove_duplicate(client, version, sha256, own_run=not ended)
        aliases = read_aliases(client, name)
        past = events.read_events(int(version.version), client.get_model_version(name, version.version).tags)
    return Registered(
        name=name,
        version=int(version.version),
        sha256=sha256,
        run_id=version.run_id,
        created=not found,
        aliases=tuple(sorted(alias for alias, number in aliases.items() if number == int(version.version))),
        promoted=any(event.alias == settings.alias for event in past),
        approval=standing(past, settings.alias),
    )


def _with_release(client: MlflowClient, found: Sequence[ModelVersion]) -> list[ModelVersion]:
    """Returns the versions whose run exists and has a release. Versions of other programs have none."""

    def has_release(version: ModelVersion) -> bool:
        run_id = existing_run(client, version.run_id or None)
        listed = client.list_artifacts(run_id, RELEASE) if run_id else []
        return any(item.path.endswith(f"/{bundle.CHECKSUMS}") for item in listed)

    return [version for version in found if has_release(version)]


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
        "dvc_lock": provenance.dvc_lock,
        "objective": provenance.params.distill.objective,
        "features": figures.features.name,
        "release_uri": uri,
        "gate": REJECTED if gate_failures else PASSED,
        "gate_reason": "; ".join(gate_failures),
    }
    return {key: str(value) for key, value in tags.items() if value}


def _update(client: MlflowClient, version: ModelVersion, tags: dict[str, str]) -> None:
    """Writes the tags that changed. If the gate's decision changed, an event is added."""
    name, number = version.name, version.version
    if lookup.URIS in tags:  # it stays published in a store that failed this time
        known = [*lookup.read_uris(tags), *lookup.read_uris(version.tags)]
        tags = tags | {lookup.URIS: json.dumps(list(dict.fromkeys(known)))}
    for key in sorted(tags.keys() | ({"gate_reason"} & version.tags.keys())):
        if version.tags.get(key) != tags.get(key, ""):
            client.set_model_version_tag(name, number, key, tags.get(key, ""))
    if version.tags.get("gate") != tags["gate"]:
        client.set_model_version_tag(name, number, *_gate_event(tags))


def _gate_event(tags: dict[str, str]) -> tuple[str, str]:
    return events.event_tag(tags["gate"], reason=tags.get("gate_reason"))


def _run_of(client: MlflowClient, settings: Registry, model: str, provenance: Provenance) -> tuple[str, bool]:
    """Returns the id of the adapter's run, and whether it has ended.

    It is the last distillation with this adapter, or the run of a registration that was killed, or a new run.
    """
    sha256 = provenance.trained
    experiment = client.get_experiment_by_name(settings.experiment)
    found = (
        client.search_runs(
            [experiment.experiment_id],
            f"tags.sha256 = '{sha256}'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if experiment
        else []
    )
    if found:
        return str(found[0].info.run_id), found[0].info.status != "RUNNING"
    return create_run(client, settings, model, provenance.params.distill.plain(), {"sha256": sha256}), False


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
        serving.write_model(Path(temporary, MODEL), model=name, base=provenance.base)
        client.log_artifacts(run_id, str(Path(temporary, MODEL)), MODEL)
    client.log_artifacts(run_id, str(folder), RELEASE)
    with Image.open(folder / "grid.png") as grid:
        side = (_PREVIEW_WIDTH, max(1, round(grid.height * _PREVIEW_WIDTH / grid.width)))
        client.log_image(run_id, grid.convert("RGB").resize(side, Image.Resampling.LANCZOS), PREVIEW)


def _remove_duplicate(client: MlflowClient, version: ModelVersion, sha256: str, *, own_run: bool) -> ModelVersion:
    """Returns the first version of this release. If another call has registered one before, `version` is deleted.

    Args:
        own_run: the version's run was made for it, and ends here.
    """
    first = _with_release(client, versions_of_release(client, sha256, version.name))[0]
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
