"""Finding versions of one model or of all, the newest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from lcmlora import masking
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.inference.mlflow_internals import is_of_database, search_versions
from lcmlora.registry.listing import collection, main_figures
from lcmlora.registry.listing.conditions import Condition, joined
from lcmlora.registry.lookup import (
    Version,
    aliases_of,
    all_versions,
    describe,
    read_aliases,
    read_metrics,
    search_all,
)
from lcmlora.registry.retention import tombstones
from lcmlora.registry.tracking import connect, of_environment, reaching

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

PAGE = 1000  # versions of a request to a server
DATABASE_PAGE = 5000  # and of one to a database, which sorts all versions for each page

Figures = Literal["none", "main", "all"]


class Found(NamedTuple):
    """Versions, the newest first, and whether there are more than were asked for."""

    versions: list[Version]
    more: bool


def versions(settings: Registry | None = None, name: str | None = None) -> list[Version]:
    """Returns all versions with all figures, of one model or of all: by name, and of each model the newest first.

    A thousand versions take some 15 seconds, nearly all of it for their figures; `find` has lists that need few of
    them.

    Args:
        settings: of the registry; MLFLOW_TRACKING_URI names it by default.
        name: of the registered model, such as lcm-lora-emoji.

    Raises:
        UserError: there is no such model, no registry was named, or MLflow cannot be reached.
    """
    found = find(settings or of_environment(), name, figures="all").versions
    return sorted(found, key=lambda version: (version.name, -version.version))


def find(
    settings: Registry,
    name: str | None = None,
    conditions: Sequence[Condition] = (),
    *,
    newest: int | None = None,
    figures: Figures = "main",
) -> Found:
    """Returns the versions that meet all conditions, the newest first. Those that are being pruned are left out.

    Args:
        name: of the registered model, such as lcm-lora-emoji; None finds those of all models.
        newest: how many at most; None for all.
        figures: `all` are read from the runs. `main` leaves `metrics` empty, and `figure` returns those of
            `main_figures`; versions without that tag, and conditions on other figures, need their runs. `none` reads
            runs only for conditions.

    Raises:
        UserError: there is no such model, or MLflow cannot be reached.
    """
    with reaching(settings, "ask again later"), collection.paused():
        client = connect(settings)
        found: list[Version] = []
        for version in _matching(client, settings, name, conditions, newest, figures):
            if len(found) == newest:
                return Found(found, more=True)
            found.append(version)
        if name and not found and not client.search_model_versions(f"name = '{name}'", max_results=1):
            raise UserError(f"{name}: not registered at {masking.address(settings.tracking_uri)}")
    return Found(found, more=False)


def described_versions(client: MlflowClient, name: str, settings: Registry) -> list[Version]:
    """Returns all versions of a model with their main figures, the newest first, also those that are being pruned."""
    found = all_versions(client, f"name = '{name}'")
    aliases = read_aliases(client, name) if found else {}
    found.sort(key=lambda version: -int(version.version))
    return [describe(version, aliases, {}, settings) for version in found]


def _matching(
    client: MlflowClient,
    settings: Registry,
    name: str | None,
    conditions: Sequence[Condition],
    newest: int | None,
    figures: Figures,
) -> Iterator[Version]:
    wanted = [f"name = '{name}'"] if name else []
    search = joined([*wanted, *(each.search for each in conditions)])
    order = ["version_number DESC"] if name else ["creation_timestamp DESC"]
    is_decided = all(each.search for each in conditions)  # by the database
    most = DATABASE_PAGE if is_of_database(client) else PAGE
    size = most if newest is None or not is_decided else min(newest + 1, most)
    plain = [each for each in conditions if each.figure is None]
    compared = [each for each in conditions if each.figure is not None]
    needs_all = figures == "all" or any(each.figure and not main_figures.is_main(each.figure) for each in compared)
    needs_any = figures != "none" or compared
    aliases: Mapping[str, Mapping[str, int]] | None = None
    for page in pages(client, search, order, size):
        if aliases is None:
            aliases = _aliases(client, name) if page else {}
        described = [describe(each, aliases.get(each.name, {}), {}, settings) for each in page]
        described = [each for each in described if tombstones.MARK not in each.tags and all(t(each) for t in plain)]
        for start in range(0, len(described), 100):  # a reader who has enough asks for no more runs
            some = described[start : start + 100]
            for version in with_figures(client, some, everything=needs_all) if needs_any else some:
                if all(test(version) for test in compared):
                    yield version


def pages(
    client: MlflowClient, search: str | None, order: Sequence[str], size: int = PAGE
) -> Iterator[list[ModelVersion]]:
    """Yields the versions that a search finds, page by page, each version once.

    A version that is made meanwhile moves those after it to a later place, and so to the next page again.
    """
    seen: set[tuple[str, str]] = set()
    token = None
    while True:
        with collection.paused():
            page = search_versions(client, search, order, size, token)
        yield [each for each in page if (each.name, str(each.version)) not in seen]
        seen |= {(each.name, str(each.version)) for each in page}
        token = page.token
        if not token:
            return


def with_figures(client: MlflowClient, found: Sequence[Version], *, everything: bool = False) -> list[Version]:
    """Returns versions whose main figures are known: those that have no tag with them get all figures of their runs.

    Args:
        everything: all versions get all figures.
    """
    lacking = [each for each in found if everything or main_figures.read(each.tags) is None]
    metrics = read_metrics(client, [each.run_id for each in lacking])
    return [replace(each, metrics=metrics[each.run_id]) if each.run_id in metrics else each for each in found]


def _aliases(client: MlflowClient, name: str | None) -> dict[str, dict[str, int]]:
    """Returns the aliases of a model, or of all: a request for each would take most of a list's time."""
    if name:
        return {name: read_aliases(client, name)}
    models: list[RegisteredModel] = search_all(client.search_registered_models)
    return {model.name: aliases_of(model) for model in models}
