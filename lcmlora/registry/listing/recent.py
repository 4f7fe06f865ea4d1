"""What happened to the versions of many models in the last days, without reading all of their versions."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from lcmlora.config import Registry
from lcmlora.registry import events
from lcmlora.registry.events import Event
from lcmlora.registry.lookup import all_versions, search_all
from lcmlora.registry.retention import tombstones
from lcmlora.registry.tracking import connect, reaching

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel


class Happened(NamedTuple):
    """An event and the registered model that it happened to."""

    name: str
    event: Event


def read(settings: Registry, names: Collection[str], since: datetime.datetime) -> list[Happened]:
    """Returns the events of all versions of these models since a moment, the oldest first, and when others were pruned.

    The database finds the versions by the day of their last event. A model whose newest version has no such tag was
    last registered by lcmlora 0.1.0: of it, all versions are read.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"):
        client = connect(settings)
        listed: list[RegisteredModel] = search_all(client.search_registered_models)
        models = [model for model in listed if model.name in names]
        former = [m.name for m in models if any(events.LAST not in each.tags for each in m.latest_versions)]
        found: dict[tuple[str, str], ModelVersion] = {}
        wanted = [f"tags.{events.LAST} = '{day}'" for day in _days(since)] + [f"name = '{name}'" for name in former]
        for search in wanted:
            versions = all_versions(client, search)
            found |= {(each.name, str(each.version)): each for each in versions if each.name in names}
    own: dict[str, list[ModelVersion]] = {}
    for each in found.values():
        own.setdefault(each.name, []).append(each)
    happened = [Happened(name, event) for name, each in own.items() for event in events.of_versions(each)]
    for model in models:
        happened += [Happened(model.name, stone.event) for stone in tombstones.read(dict(model.tags))]
    begin = since.astimezone(datetime.UTC).isoformat()
    return sorted((each for each in happened if each.event.time >= begin), key=lambda each: each.event.time)


def _days(since: datetime.datetime) -> list[str]:
    first, today = since.astimezone(datetime.UTC).date(), datetime.datetime.now(datetime.UTC).date()
    return [(first + datetime.timedelta(days=day)).isoformat() for day in range((today - first).days + 1)]
