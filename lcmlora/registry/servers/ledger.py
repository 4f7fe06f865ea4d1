"""Which adapters were registered, so that one whose version a person deleted in MLflow does not come back by itself.

MLflow keeps no trace of a deleted version that a client can read. So the registered model has a tag with the version
of each adapter, `3:60a5d3e41c9b 4:9f...`: an adapter that it names and that no version has was deleted. The run of the
adapter has a tag with its version as well, which is left if the whole model is deleted. A third tag has the name that
the model was registered under, by which it is found after it was renamed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lcmlora.errors import NotFound
from lcmlora.io.terminal import note
from lcmlora.registry.tracking import is_forbidden

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

NAME, ADAPTERS = "lcmlora_model", "lcmlora_adapters"  # tags of a registered model
VERSION = "lcmlora_version"  # tag of a run: NAME/VERSION

DIGITS = 12  # of a SHA-256 in the tag
LONGEST = 4800  # characters of the tag; MLflow's databases have room for 5000, so for 150 adapters
_TRIES = 5  # where several registrations write the tag at once


def refuse_renamed(client: MlflowClient, name: str) -> None:
    """Raises an error where no model of this name is registered, and one that once had this name is.

    Raises:
        NotFound: it was renamed; the message has the present name.
    """
    found = client.search_registered_models(f"tags.`{NAME}` = '{name}'", max_results=10)
    renamed = sorted(model.name for model in found if model.name != name)
    if renamed and all(model.name != name for model in found) and registered_model(client, name) is None:
        raise NotFound(
            f"{name}: was renamed to {renamed[0]} in MLflow; rename it back, since everything finds it by its name, or "
            f"name it exactly (models:/{renamed[0]}@ALIAS)"
        )


def registered_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """Returns the registered model of this name, None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def deleted_version(client: MlflowClient, name: str, sha256: str, trained: str, experiment: str) -> int | None:
    """Returns the number that an adapter's version had, if it was registered and no version has the adapter any more.

    None where it was never registered, or is registered now.

    Args:
        sha256: of the released weights.
        trained: SHA-256 of the weights as they were trained, which their run has as a tag.
        experiment: the name of MLflow's experiment with that run.
    """
    number = _entered(client, name, sha256, trained, experiment)
    if number is None:
        return None
    for tag, value in {("sha256", sha256), ("sha256", trained), ("adapter", trained)}:
        if client.search_model_versions(f"name = '{name}' and tags.{tag} = '{value}'", max_results=1):
            return None
    return number


def _entered(client: MlflowClient, name: str, sha256: str, trained: str, experiment: str) -> int | None:
    """Returns the version of an adapter in the ledger of its model or the tags of its run."""
    model = registered_model(client, name)
    adapters = _adapters(model.tags) if model else {}
    if number := adapters.get(sha256[:DIGITS]) or adapters.get(trained[:DIGITS]):
        return number
    tags = (run.data.tags.get(VERSION, "") for run in _runs(client, trained, experiment))
    found = (re.fullmatch(rf"{re.escape(name)}/([0-9]{{1,9}})", tag) for tag in tags)
    return next((int(match[1]) for match in found if match), None)


def enter(client: MlflowClient, name: str, version: int, sha256: str, trained: str, run_id: str | None) -> None:
    """Enters the version of an adapter into the ledger of its model and the tags of its run.

    The oldest versions are left out where the tag would become too long.
    """
    wanted = f"{name}/{version}"
    if run_id and client.get_run(run_id).data.tags.get(VERSION) != wanted:
        client.set_tag(run_id, VERSION, wanted)
    try:
        _enter(client, name, dict.fromkeys((sha256[:DIGITS], trained[:DIGITS]), version))
    except Exception as error:
        if not is_forbidden(error):
            raise
        # A user may be permitted to make versions, and not to promote them, for which MLflow asks for the same right.
        note(f"note: {name}: this user may not write its tags; that {wanted} was there is known by its run alone")


def _enter(client: MlflowClient, name: str, entries: Mapping[str, int]) -> None:
    for _ in range(_TRIES):
        tags = client.get_registered_model(name).tags
        if tags.get(NAME) != name:
            client.set_registered_model_tag(name, NAME, name)
        adapters = _adapters(tags)
        if entries.items() <= adapters.items():
            break
        # Another registration may write at the same moment and leave these out, so that they are read again.
        client.set_registered_model_tag(name, ADAPTERS, _text({**adapters, **entries}))


def forget(client: MlflowClient, name: str, sha256: str, trained: str, experiment: str) -> None:
    """Removes an adapter from the ledger, so that it is registered again when it comes again.

    Args:
        sha256, trained, experiment: as for `deleted_version`.
    """
    model = registered_model(client, name)
    adapters = _adapters(model.tags) if model else {}
    kept = {digits: number for digits, number in adapters.items() if digits not in (sha256[:DIGITS], trained[:DIGITS])}
    if kept != adapters:
        client.set_registered_model_tag(name, ADAPTERS, _text(kept))
    for run in _runs(client, trained, experiment):
        if run.info.lifecycle_stage == "active" and run.data.tags.get(VERSION, "").startswith(f"{name}/"):
            client.delete_tag(run.info.run_id, VERSION)


def _adapters(tags: Mapping[str, str]) -> dict[str, int]:
    """Returns the version by the digits of each adapter's SHA-256. What others wrote into the tag is left out."""
    found = re.findall(rf"(?:^|(?<=\s))([0-9]{{1,9}}):([0-9a-f]{{{DIGITS}}})(?=\s|$)", tags.get(ADAPTERS, ""))
    return {digits: int(number) for number, digits in found}


def _text(adapters: Mapping[str, int]) -> str:
    """Returns the tag's value, the newest versions first, as many as there is room for."""
    entries = [f"{number}:{digits}" for digits, number in sorted(adapters.items(), key=lambda entry: -entry[1])]
    while sum(len(entry) + 1 for entry in entries) > LONGEST:
        entries.pop()
    return " ".join(entries)


def _runs(client: MlflowClient, trained: str, experiment: str) -> list[Run]:
    """Returns the runs with this adapter, also those that were deleted, the newest first."""
    from mlflow.entities import ViewType

    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    condition = f"tags.sha256 = '{trained}'"
    order = ["attributes.start_time DESC"]
    return list(client.search_runs([found.experiment_id], condition, ViewType.ALL, max_results=100, order_by=order))
