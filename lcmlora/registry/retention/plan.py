"""What `lcmlora prune` would delete of versions, runs and releases, with bytes and reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from lcmlora.config import Publish, Registry
from lcmlora.errors import NotFound, UserError
from lcmlora.io.terminal import note
from lcmlora.registry import events
from lcmlora.registry.approval.standing import AWAITING, standing
from lcmlora.registry.listing.search import described_versions
from lcmlora.registry.lookup import PREFIX, Version, search_all
from lcmlora.registry.retention import tombstones
from lcmlora.registry.retention.selection import Choice, Rules, choose
from lcmlora.registry.retention.tombstones import MARK, Tombstone
from lcmlora.registry.tracking import connect, reaching
from lcmlora.releases import removal
from lcmlora.releases.removal import Stored
from lcmlora.releases.stores.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

BYTES = "artifact_bytes"  # tag of a run: bytes of its artifacts, written when its release is registered
_ENDED = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True)
class PrunedVersion:
    """A version that goes, with its releases, and its run where no other version has it."""

    version: Version
    why: str
    releases: tuple[Stored, ...]
    artifact_bytes: int | None  # None: not known


@dataclass(frozen=True)
class PrunedRun:
    """A run that goes: it ended without a version, or was deleted on MLflow's page."""

    run_id: str
    why: str
    artifact_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """What goes, and what is kept for which reason.

    unfinished: versions whose deletion was interrupted after they had left the registry, with their registered model.
    """

    versions: tuple[PrunedVersion, ...]
    runs: tuple[PrunedRun, ...]
    unfinished: tuple[tuple[str, Tombstone], ...]
    kept: tuple[tuple[str, str], ...]  # reference, reason


def make_plan(settings: Registry, publish: Publish, models: Sequence[str], rules: Rules) -> Plan:
    """Returns what the rules say about all versions, runs and releases of these models.

    Releases of other projects, which no version of this registry names, are left alone.

    Args:
        publish: of which `to` names all stores, and the others how they are reached.
        models: names under `models` in params.yaml.

    Raises:
        UserError: MLflow or a store cannot be reached, or a channel's pointer cannot be read.
    """
    with reaching(settings, "nothing was deleted"):
        client = connect(settings)
        registered: list[RegisteredModel] = search_all(client.search_registered_models)
        by_name = {model.name: model for model in registered}
        versions: list[PrunedVersion] = []
        unfinished: list[tuple[str, Tombstone]] = []
        kept: list[tuple[str, str]] = []
        used: set[str] = set()  # runs
        for model in models:
            name = f"{PREFIX}{model.removeprefix(PREFIX)}"
            if name not in by_name:
                continue
            found = described_versions(client, name, settings)
            # Those with a tombstone have left the registry, or were about to when the deletion was interrupted.
            left = [stone for stone in tombstones.read(dict(by_name[name].tags)) if not stone.finished]
            unfinished += [(name, stone) for stone in left]
            found = [each for each in found if each.version not in {stone.version for stone in left}]
            releases, channels = releases_of(found, publish, name.removeprefix(PREFIX))
            waiting = frozenset(each.reference for each in found if _waits(each, settings.alias))
            choices = choose(found, channels, replace(rules, awaiting=rules.awaiting | waiting))
            kept += [(choice.version.reference, choice.kept) for choice in choices if choice.kept is not None]
            used |= {choice.version.run_id for choice in choices if choice.kept is not None}
            versions += _going(client, choices, releases)
        going = {each.version.run_id for each in versions} | {stone.run_id for _, stone in unfinished}
        runs = _runs(client, settings, models, rules, used | going)
    return Plan(tuple(versions), runs, tuple(unfinished), tuple(kept))


def _going(client: MlflowClient, choices: Sequence[Choice], releases: Sequence[Stored]) -> list[PrunedVersion]:
    """Returns the versions that go, each with its releases, but for one that a kept version shares."""
    shared = {choice.version.sha256[:12] for choice in choices if choice.kept is not None}
    found = []
    for version, why in ((choice.version, choice.why) for choice in choices if choice.kept is None):
        digits = version.sha256[:12]
        own = tuple(each for each in releases if each.prefix.endswith(f"-{digits}") and digits not in shared)
        found.append(PrunedVersion(version, why, own, _artifact_bytes(client, version.run_id)))
    return found


def _waits(version: Version, alias: str) -> bool:
    """Returns whether a person is asked to approve the version."""
    found = standing(events.read_events(version.version, version.tags), alias)
    return found is not None and found.state == AWAITING


def releases_of(found: Sequence[Version], publish: Publish, model: str) -> tuple[list[Stored], dict[str, list[str]]]:
    """Returns the releases of a model in all stores, and what points to them by the first 12 digits of their weights.

    Stores are those of `publish.to`, and those that a version's tags name. What lies in one of the latter that cannot
    be reached stays, so it counts as pointed to.
    """
    own = publish.of(model)
    roots = {open_store(store).uri: store for store in map(own.to_one, own.stores)}
    places = [(place[0], v.sha256[:12]) for v in found for uri in v.uris if (place := removal.release_of(uri))]
    releases: list[Stored] = []
    pointing: dict[str, list[str]] = {}
    former = {root for root, _ in places} - roots.keys()
    for root in [*roots, *sorted(former)]:
        store = roots.get(root) or publish.to_one(root)
        try:
            inside = list(removal.find(store, model).values())
        except UserError as error:
            # A repository of the hub is made at the first release.
            if root in roots and not isinstance(error, NotFound):
                raise
            note(f"warning: {error}")
            for at, digits in places:
                if at == root:
                    pointing.setdefault(digits, []).append(f"a version keeps a release at {root}, which fails; it")
            continue
        releases += inside
        for each in inside:
            named = [f"channel {channel} of {root}" for channel in each.channels]
            pointing.setdefault(each.prefix.rpartition("-")[2], []).extend(named)
    return releases, {digits: names for digits, names in pointing.items() if names}


def _runs(
    client: MlflowClient, settings: Registry, models: Sequence[str], rules: Rules, used: set[str]
) -> tuple[PrunedRun, ...]:
    """Returns the runs of these models without a version that have ended long ago, and those marked before."""
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(settings.experiment)
    if experiment is None:
        return ()
    found, token = [], None
    while True:
        page = client.search_runs([experiment.experiment_id], "", ViewType.ALL, 1000, page_token=token)
        for run in page:
            why = _why_run_goes(run, models, rules) if run.info.run_id not in used else None
            if why and not client.search_model_versions(f"run_id = '{run.info.run_id}'", max_results=1):
                found.append(PrunedRun(run.info.run_id, why, artifact_bytes(run)))
        token = page.token
        if not token:
            return tuple(found)


def _why_run_goes(run: Run, models: Sequence[str], rules: Rules) -> str | None:
    """Returns why a run without a version goes, None where it stays. Runs of other programs have no tag `model`."""
    from datetime import UTC, datetime

    tags, info = run.data.tags, run.info
    if tags.get("model") not in models or tags.get("sha256") in rules.local:
        return None
    deleted = info.lifecycle_stage == "deleted"
    ended = datetime.fromtimestamp((info.end_time or info.start_time) / 1000, UTC).isoformat()
    # Of a run that was killed, MLflow believes for ever that it goes on; nothing trains for a month.
    days = max(rules.settings.days, 1.0) if info.status in _ENDED or deleted else max(rules.settings.days, 31.0)
    if tags.get(MARK):  # its deletion is the last step, but for the rows in the database
        return None if deleted else "its deletion was interrupted"
    if rules.is_young(ended, days):
        return None
    if deleted:
        return "was deleted on MLflow's page"
    return f"{info.status.lower()} without a version, older than {days:g} days"


def _artifact_bytes(client: MlflowClient, run_id: str) -> int | None:
    from mlflow.exceptions import MlflowException

    try:
        return artifact_bytes(client.get_run(run_id))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return 0


def artifact_bytes(run: Run) -> int | None:
    """Returns the bytes of a run's artifacts: of its folder, else as its tag says; None where neither is known."""
    folder = local_folder(run)
    if folder is not None:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    noted = run.data.tags.get(BYTES, "")
    return int(noted) if noted.isdecimal() else None


def local_folder(run: Run) -> Path | None:
    """Returns the folder of a run's artifacts on this machine, None where they are elsewhere."""
    uri = run.info.artifact_uri
    if "://" not in uri and not uri.startswith("mlflow-artifacts:"):
        return Path(uri)
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else None
