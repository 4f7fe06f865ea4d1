"""The champion and the newest version of many models, without reading their other versions or any run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lcmlora.config import Registry
from lcmlora.registry.listing.search import pages, with_figures
from lcmlora.registry.lookup import Version, aliases_of, all_versions, describe, search_all
from lcmlora.registry.retention import tombstones
from lcmlora.registry.tracking import connect, reaching

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION_RUN = "lcmlora_champion_run"  # tag of a registered model: by it, the champions of many are found in one search

_RUNS = 50  # in a search, which a client over http sends in the address: many proxies take no more than 4 KB there


class Current(NamedTuple):
    """What is known of a model now. Versions that are being pruned count as gone."""

    champion: Version | None
    newest: Version | None


def read(settings: Registry, names: Collection[str]) -> dict[str, Current]:
    """Returns the champion and the newest version of each model of these names that is registered.

    Their `metrics` are empty, and `figure` returns the main ones.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        client = connect(settings)
        listed: list[RegisteredModel] = search_all(client.search_registered_models)
        models = {model.name: model for model in listed if model.name in names}
        newest = {name: found for name, model in models.items() if (found := _newest(client, model)) is not None}
        champions = _champions(client, models, newest, settings.alias)
        described = {
            (each.name, int(each.version)): describe(each, aliases_of(models[each.name]), {}, settings)
            for each in (*newest.values(), *champions.values())
        }
        known = {(each.name, each.version): each for each in with_figures(client, list(described.values()))}

    def version(found: ModelVersion | None) -> Version | None:
        return None if found is None else known[found.name, int(found.version)]

    return {name: Current(version(champions.get(name)), version(newest.get(name))) for name in models}


def _newest(client: MlflowClient, model: RegisteredModel) -> ModelVersion | None:
    """Returns the newest version, which MLflow sends with its model: the newest one of each stage."""
    found = max(model.latest_versions, key=lambda version: int(version.version), default=None)
    if found is not None and tombstones.MARK not in found.tags:
        return found
    for page in pages(client, f"name = '{model.name}'", ["version_number DESC"]):
        if kept := next((each for each in page if tombstones.MARK not in each.tags), None):
            return kept
    return None


def _champions(
    client: MlflowClient, models: Mapping[str, RegisteredModel], newest: Mapping[str, ModelVersion], alias: str
) -> dict[str, ModelVersion]:
    numbers = {name: number for name, model in models.items() if (number := aliases_of(model).get(alias)) is not None}
    found = {name: each for name, each in newest.items() if int(each.version) == numbers.get(name)}
    runs = {models[name].tags.get(CHAMPION_RUN, "") for name in numbers.keys() - found}
    for version in _of_runs(client, sorted(run for run in runs if re.fullmatch(r"[0-9a-f]{32}", run))):
        if int(version.version) == numbers.get(version.name):
            found[version.name] = version
    for name in numbers.keys() - found:  # the alias was moved on MLflow's page, or by an earlier lcmlora
        found[name] = client.get_model_version(name, str(numbers[name]))
    return {name: each for name, each in found.items() if tombstones.MARK not in each.tags}


def _of_runs(client: MlflowClient, run_ids: Sequence[str]) -> list[ModelVersion]:
    found: list[ModelVersion] = []
    for start in range(0, len(run_ids), _RUNS):
        listed = ", ".join(f"'{run_id}'" for run_id in run_ids[start : start + _RUNS])
        found += all_versions(client, f"run_id IN ({listed})")
    return found
