"""Looking up a version of `lcm-lora-<model>` in MLflow's registry, and comparing two.

A version is an MLflow model that can be served (lcmlora/inference/serving.py). The release is among its artifacts.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lcmlora import masking
from lcmlora.config import Registry
from lcmlora.errors import NotFound, UserError
from lcmlora.inference.mlflow_internals import search_versions
from lcmlora.io.parsing import JsonObject, Malformed, parse_json
from lcmlora.io.private import downloads
from lcmlora.registry import events
from lcmlora.registry.approval.standing import standing
from lcmlora.registry.costs.spent import figures
from lcmlora.registry.downloads import offline
from lcmlora.registry.listing import collection, main_figures
from lcmlora.registry.retention import tombstones
from lcmlora.registry.servers import ledger
from lcmlora.registry.tracking import connect, of_environment, reaching

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.store.entities import PagedList


T = TypeVar("T")

PASSED, REJECTED = "passed", "rejected"

URIS = "release_uris"  # the tag with all addresses of a release, where there are several stores
PREFIX = "lcm-lora-"  # of the names of registered models
_EXACT = "models:/"
_CHANGED = ("last_updated_timestamp DESC", "name ASC", "version_number DESC")

MODEL = "model"  # the artifact folder of a run's MLflow model
RELEASE = f"{MODEL}/artifacts/release"


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with the facts about its adapter."""

    name: str
    version: int
    sha256: str
    base: dict[str, str | None]  # source, revision, digest
    objective: str
    features: str
    metrics: dict[str, float]  # by MLflow's flat names; none in a list that did not need them
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
    promoted: str | None  # the last time that it got the configured alias
    foreign_events: tuple[str, ...]  # tags that are named like events and that lcmlora did not write
    tags: dict[str, str]
    approval: str | None = None  # awaiting, approved, rejected, timed out, superseded; None where nobody was asked
    git_dirty: str | None = None  # true or false: whether tracked files differed from the commit

    @property
    def reference(self) -> str:
        """NAME/VERSION, such as lcm-lora-emoji/3."""
        return f"{self.name}/{self.version}"

    @property
    def exact(self) -> str:
        """The version as `resolve` takes it, whatever its name: models:/NAME/VERSION."""
        return f"{_EXACT}{self.reference}"

    @property
    def uris(self) -> list[str]:
        """The addresses of its release, first the one that is looked up; none if it was never published."""
        first = [self.release_uri] if self.release_uri else []
        return list(dict.fromkeys([*first, *read_uris(self.tags)]))

    @property
    def trained(self) -> str:
        """The SHA-256 of the adapter as it was trained; that of its release's weights in versions until 2026-11-28."""
        return self.tags.get("adapter") or self.sha256

    def figure(self, name: str) -> float | None:
        """Returns a figure by its name, with or without the features in front of it; None where it is not known."""
        found = (value for key, value in self.metrics.items() if key == name or key.endswith(f"/{name}"))
        return next(found, None) if self.metrics else (main_figures.read(self.tags) or {}).get(name)

    def fact(self, name: str) -> object:
        """Returns a field, else the tag of this name; None where there is neither."""
        return getattr(self, name) if name in self.__dataclass_fields__ else self.tags.get(name)

    def plain(self) -> JsonObject:
        """Returns all fields as JSON values."""
        return asdict(self)

    @classmethod
    def of_plain(cls, values: JsonObject) -> Version:
        """Returns the version that `plain` returned these fields of."""
        lists = {name: tuple(values[name]) for name in ("aliases", "foreign_events")}
        return cls(**{**values, **lists})


def read_uris(tags: Mapping[str, str]) -> list[str]:
    """Returns the addresses of a release in several stores by the tags of its version; none without that tag."""
    try:
        listed = parse_json(tags.get(URIS) or "[]")
    except Malformed:
        return []  # of another program
    return [uri for uri in listed if isinstance(uri, str)] if isinstance(listed, list) else []


def resolve(reference: str, settings: Registry | None = None, *, cache: Path | None = None) -> Version:
    """Returns the version that a reference names.

    With LCMLORA_OFFLINE=1 it is the one that this user downloaded under this name, as it was then.

    Args:
        reference: `emoji@champion` or `emoji/3`, with or without `lcm-lora-`; `models:/NAME@champion`, with the exact
            name; or the SHA-256 of an adapter, as it was trained or as it was released, whose newest version is
            returned; twelve of its digits are enough.
        settings: of the registry; MLFLOW_TRACKING_URI names it by default.
        cache: the folder of downloaded adapters; the user's by default. Only LCMLORA_OFFLINE reads it.

    Raises:
        UserError: there is no such version, no registry was named, or MLflow cannot be reached.
    """
    settings = settings or of_environment()
    if offline.is_asked_for():
        return Version.of_plain(offline.recall(cache or downloads("adapters"), settings, canonical(reference)))
    with reaching(settings, "ask again later"):
        client = connect(settings)
        version = find_version(client, reference, settings)
        return _described(client, version, settings)


def champion(model: str, settings: Registry | None = None) -> Version | None:
    """Returns the version of `lcm-lora-<model>` that has the configured alias, None where none has.

    Args:
        settings: of the registry; MLFLOW_TRACKING_URI names it by default, and the alias is then `champion`.

    Raises:
        UserError: no registry was named, or MLflow cannot be reached.
    """
    settings = settings or of_environment()
    name = f"lcm-lora-{model}"
    with reaching(settings, "ask again later"):
        client = connect(settings)
        number = read_aliases(client, name).get(settings.alias) if _is_registered(client, name) else None
        return None if number is None else _described(client, _get(client, name, number, settings), settings)


@dataclass(frozen=True)
class Difference:
    """A fact or figure of two versions; None where a version has none."""

    figure: str
    first: float | str | None
    second: float | str | None

    @property
    def change(self) -> float | None:
        """Returns second - first, None where they are no numbers."""
        if isinstance(self.first, float) and isinstance(self.second, float):
            return self.second - self.first
        return None


def compare(first: Version, second: Version) -> list[Difference]:
    """Returns the facts of two versions, and after them their costs and metrics, side by side."""
    facts = (
        "sha256",
        "objective",
        "features",
        "data_digest",
        "data_dvc",
        "git_commit",
        "git_dirty",
        "dvc_lock",
        "gate",
    )
    rows = [Difference(name, getattr(first, name), getattr(second, name)) for name in facts]
    rows += [Difference(f"base {key}", first.base[key], second.base[key]) for key in first.base]
    one, two = figures(first.tags), figures(second.tags)
    rows += [Difference(name, one[name], two[name]) for name in one if one[name] or two[name]]
    names = dict.fromkeys([*first.metrics, *second.metrics])
    return rows + [Difference(name, first.metrics.get(name), second.metrics.get(name)) for name in names]


def registered_name(model: str) -> str:
    """Returns the registered model of a model's versions, such as lcm-lora-emoji. `models:/NAME` is an exact name."""
    if model.startswith(_EXACT):
        return model.removeprefix(_EXACT)
    return f"{PREFIX}{model.removeprefix(PREFIX)}"


def canonical(reference: str) -> str:
    """Returns a reference with the exact name of the registered model; digits of a SHA-256 as they are."""
    match = re.fullmatch(r"((?:models:/)?[^@/]+)([@/].+)", reference)
    return registered_name(match[1]) + match[2] if match else reference


def find_version(client: MlflowClient, reference: str, settings: Registry) -> ModelVersion:
    """Returns MLflow's entity of the version that a reference names; see `resolve`."""
    if re.fullmatch(r"[0-9a-f]{12,64}", reference):
        found = [version for version in versions_of_adapter(client, reference) if tombstones.MARK not in version.tags]
        if not found:
            _explain_pruned_adapter(client, reference)
            raise NotFound(f"{reference}: no adapter of this SHA-256 at {masking.address(settings.tracking_uri)}")
        return found[-1]
    match = re.fullmatch(r"((?:models:/)?[^@/]+)(?:@([^@/]+)|/(\d+))", reference)
    if match is None:
        raise UserError(
            f"{reference!r}: expected MODEL@ALIAS, MODEL/VERSION or the SHA-256 of an adapter, such as emoji@champion"
        )
    name, alias, number = registered_name(match[1]), match[2], match[3]
    if alias is None:
        return _get(client, name, int(number), settings)
    aliases = read_aliases(client, name) if _is_registered(client, name) else None
    if aliases is None:
        ledger.refuse_renamed(client, name)
        raise NotFound(f"{reference}: not registered at {masking.address(settings.tracking_uri)}")
    if alias not in aliases:
        raise NotFound(f"{reference}: no such alias; {name} has {', '.join(sorted(aliases)) or 'none'}")
    return _get(client, name, aliases[alias], settings)


def _get(client: MlflowClient, name: str, version: int, settings: Registry) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        ledger.refuse_renamed(client, name)
        if _is_registered(client, name):
            _explain_pruned(client, name, version)
        raise NotFound(f"{name}/{version}: not registered at {masking.address(settings.tracking_uri)}") from error
    if tombstones.MARK in found.tags:
        _explain_pruned(client, name, version)
        raise NotFound(f"{name}/{version}: is being pruned since {found.tags[tombstones.MARK][:19]}Z")
    return found


def _explain_pruned(client: MlflowClient, name: str, version: int) -> None:
    """Raises NotFound with the tombstone's line, if the version has one."""
    stones = tombstones.read(dict(client.get_registered_model(name).tags))
    if stone := next((stone for stone in stones if stone.version == version), None):
        raise NotFound(stone.line(name))


def _explain_pruned_adapter(client: MlflowClient, digits: str) -> None:
    """Raises NotFound with the tombstone's line, if a version of any model with such an adapter has one."""
    models: list[RegisteredModel] = search_all(client.search_registered_models)
    for model in models:
        if stone := tombstones.with_digits(tombstones.read(dict(model.tags)), digits):
            raise NotFound(f"{digits}: is the adapter of {stone.line(model.name)}")


def _is_registered(client: MlflowClient, name: str) -> bool:
    return bool(client.search_registered_models(f"name = '{name}'", max_results=1))


def versions_of_release(client: MlflowClient, sha256: str, name: str) -> list[ModelVersion]:
    """Returns the versions of this model whose released weights have this SHA-256, the oldest first."""
    found = all_versions(client, f"name = '{name}' and tags.sha256 = '{sha256}'")
    return sorted(found, key=lambda version: int(version.version))


def versions_of_adapter(client: MlflowClient, digits: str) -> list[ModelVersion]:
    """Returns the versions whose weights, as released or as trained, have a SHA-256 with these digits, oldest first."""
    found: dict[tuple[str, str], ModelVersion] = {}
    for tag in ("sha256", "adapter"):
        for version in all_versions(client, f"tags.{tag} LIKE '{digits}%'"):
            found[version.name, version.version] = version
    return sorted(found.values(), key=lambda version: int(version.version))


def search_all(search: Callable[..., PagedList[T]], condition: str | None = None) -> list[T]:
    """Returns all results of one of the client's search methods, which return them in pages."""
    with collection.paused():
        page = search(condition, max_results=1000)
        found = list(page)
        while page.token:
            page = search(condition, max_results=1000, page_token=page.token)
            found += page
    return found


def all_versions(client: MlflowClient, condition: str) -> list[ModelVersion]:
    """Returns all versions that a search finds, the one that was changed last first."""

    def search(condition: str | None, max_results: int, page_token: str | None = None) -> PagedList[ModelVersion]:
        found: PagedList[ModelVersion] = search_versions(client, condition, _CHANGED, max_results, page_token)
        return found

    return search_all(search, condition)


def read_aliases(client: MlflowClient, name: str) -> dict[str, int]:
    """Returns the version number of each alias of a model. `search_model_versions` leaves aliases out."""
    return aliases_of(client.get_registered_model(name))


def aliases_of(model: RegisteredModel) -> dict[str, int]:
    """Returns the version number of each alias of a model."""
    # The numbers are integers from a database, and text from a server.
    return {alias: int(number) for alias, number in model.aliases.items()}


def _described(client: MlflowClient, found: ModelVersion, settings: Registry) -> Version:
    """Returns a version with its aliases and all figures."""
    metrics = read_metrics(client, [found.run_id])
    return describe(found, read_aliases(client, found.name), metrics.get(found.run_id, {}), settings)


def describe(
    found: ModelVersion, aliases: Mapping[str, int], metrics: Mapping[str, float], settings: Registry
) -> Version:
    """Returns the facts about a version.

    Args:
        aliases: those of its model, with their versions.
        metrics: those of its run; empty if they are not needed.
    """
    tags, number = dict(found.tags), int(found.version)
    past, foreign = events.own_and_foreign(number, tags)
    promotions = [event.time for event in past if event.alias == settings.alias]
    return Version(
        name=found.name,
        version=number,
        sha256=tags.get("sha256", ""),
        base={
            "source": tags.get("base"),
            "revision": tags.get("base_revision"),
            "digest": tags.get("base_digest"),
            # Versions from before 2026-11 have no such tag: their digest is the UNet's.
            **({"unet": tags["base_unet"]} if "base_unet" in tags else {}),
        },
        objective=tags.get("objective", ""),
        features=tags.get("features", ""),
        metrics=dict(metrics),
        data_digest=tags.get("data_digest", ""),
        data_dvc=tags.get("data_dvc"),
        git_commit=tags.get("git_commit"),
        dvc_lock=tags.get("dvc_lock"),
        gate=tags.get("gate", ""),
        gate_reason=tags.get("gate_reason") or None,
        release_uri=tags.get("release_uri"),
        run_id=found.run_id or "",
        aliases=tuple(sorted(alias for alias, each in aliases.items() if each == number)),
        created=_iso(found.creation_timestamp),
        updated=_iso(found.last_updated_timestamp),
        promoted=promotions[-1] if promotions else None,
        foreign_events=foreign,
        tags=tags,
        approval=decided.state if (decided := standing(past, settings.alias)) else None,
        git_dirty=tags.get("git_dirty"),
    )


def read_metrics(client: MlflowClient, run_ids: Iterable[str | None]) -> dict[str, dict[str, float]]:
    """Returns all figures of runs, by one request for 100 of them."""
    # Other programs may have registered a version with any text as its run.
    known = sorted({run_id for run_id in run_ids if run_id and re.fullmatch(r"[0-9a-f]{32}", run_id)})
    experiments = [experiment.experiment_id for experiment in client.search_experiments()] if known else []
    metrics: dict[str, dict[str, float]] = {}
    for start in range(0, len(known), 100):
        listed = ", ".join(f"'{run_id}'" for run_id in known[start : start + 100])
        for run in client.search_runs(experiments, f"attributes.run_id IN ({listed})", max_results=100):
            metrics[run.info.run_id] = dict(run.data.metrics)
    return metrics


def _iso(milliseconds: int | None) -> str:
    if milliseconds is None:
        return ""
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
