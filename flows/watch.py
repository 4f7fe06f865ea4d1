"""The flow that notices changes of data sets and bases, and emits events on which a deployment retrains."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds
    from lcmlora.flows.verbs import standalone, watch

    standalone("flows.watch", watch)

import hashlib
import os
from pathlib import Path

from prefect import State, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.states import Completed, Failed
from prefect.variables import Variable

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows.overview import has_server
from lcmlora.tasks.output import slug
from lcmlora.tasks.retrying import networked
from lcmlora.tasks.watched_inputs import read_base_state, read_data_state

DATASET_CHANGED = "lcmlora.dataset.changed"
BASE_CHANGED = "lcmlora.base.changed"


@flow(name="watch")
def watch_inputs(params: str = "params.yaml") -> State:
    """Emits `lcmlora.dataset.changed` and `lcmlora.base.changed` once for each change. Ends as Changed or Unchanged.

    Pictures and local bases are compared with their state at the last run of this flow; the first run only remembers
    it. A base on the hub is compared with the revision that params.yaml pins: a new commit is reported, and used only
    when a person pins it.
    """
    try:
        settings = config.load(Path(params))
    except UserError as error:
        return Failed(message=str(error))
    memory = _memory(settings)
    before: dict[str, str] = Variable.get(memory, default={})
    now = dict(before)
    data_changes, data_errors = _check_data(settings, before, now)
    base_changes, base_errors = _check_bases(settings, before, now)
    changes, errors = data_changes + base_changes, data_errors + base_errors
    if now != before:
        # After the events: a flow that is killed in between emits an event twice rather than never.
        Variable.set(memory, now, overwrite=True)
    for line in changes:
        get_run_logger().info(line)
    if changes:
        create_markdown_artifact("\n".join(f"* {line}" for line in changes), key="changes")
    if errors:
        return Failed(message="\n".join(errors))
    return Completed(name="Changed" if changes else "Unchanged", message="; ".join(changes) or "nothing has changed")


def _memory(settings: config.Config) -> str:
    """Returns the name of the variable that remembers this project's state.

    A server's is the same for all clones of a project, whatever worker looks. Without a server, all projects of this
    user share one database, so that the folder's path tells them apart.
    """
    name = f"watch_{slug(settings.registry.experiment)}"
    return name if has_server() else f"{name}_{hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:12]}"


def _check_data(settings: config.Config, before: dict[str, str], now: dict[str, str]) -> tuple[list[str], list[str]]:
    """Emits an event for each data set that has changed, and writes its state into `now`.

    Returns:
        Changes and errors, a line for each.
    """
    changes, errors = [], []
    for key, (data, models) in data_sets(settings).items():
        try:
            now[key] = read_data_state(data)
        except UserError as error:
            errors.append(str(error))
            continue
        if before.get(key, now[key]) != now[key]:
            changes.append(f"the data set at {data.path} has changed")
            emit_event(
                DATASET_CHANGED,
                resource={"prefect.resource.id": f"lcmlora.{key}"},
                payload={"models": models, "path": data.path},
            )
    return changes, errors


def _check_bases(settings: config.Config, before: dict[str, str], now: dict[str, str]) -> tuple[list[str], list[str]]:
    """As `_check_data`, for the bases."""
    changes, errors = [], []
    for model in settings.models:
        base, key = settings.base(model), f"base.{model}"
        try:
            now[key] = networked(read_base_state, settings)(model, settings)
        except UserError as error:
            errors.append(str(error))
            continue
        # At the first run, a base of the hub is compared with its pinned revision; a local one is only remembered.
        known = before.get(key, base.revision or now[key])
        if now[key] not in (known, base.revision):
            pinned = f", and params.yaml pins {base.revision}" if base.revision else ""
            changes.append(f"the base of {model}, {base.source}, is at {now[key][:12]} now{pinned}")
            payload: dict[str, object] = {
                "models": [model],
                "source": base.source,
                "revision": base.revision,
                "now": now[key],
            }
            emit_event(BASE_CHANGED, resource={"prefect.resource.id": f"lcmlora.base.{model}"}, payload=payload)
    return changes, errors


def data_sets(settings: config.Config) -> dict[str, tuple[config.Data, list[str]]]:
    """Returns each data set and the models that learn from it, by its name in the flow's memory."""
    shared = {"dataset": (settings.data, settings.models_sharing_data())} if settings.uses_shared_data() else {}
    own = [model for model in settings.models if settings.has_own_data(model)]
    return shared | {f"dataset.{model}": (settings.data_for(model), [model]) for model in own}
