"""Looks whether the data set or a base has changed and says so as an event; a deployment retrains on it."""

from __future__ import annotations

from pathlib import Path

from prefect import State, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.states import Completed, Failed
from prefect.variables import Variable

from lcmlora import config
from lcmlora.errors import UserError
from tasks.changes import read_base_state, read_data_state
from tasks.output import slug
from tasks.retrying import networked

DATASET_CHANGED = "lcmlora.dataset.changed"
BASE_CHANGED = "lcmlora.base.changed"


@flow(name="watch")
def watch(params: str = "params.yaml") -> State:
    """Emits `lcmlora.dataset.changed` and `lcmlora.base.changed`, once for each change; ends as Changed or Unchanged.

    Pictures and local bases are compared with the last time that this flow looked; the first look only remembers them.
    A base on the hub is compared with the revision that params.yaml pins: a new commit is told, and used when a person
    pins it.
    """
    try:
        settings = config.load(Path(params))
    except UserError as error:
        return Failed(message=str(error))
    memory = f"watch_{slug(settings.registry.experiment)}"
    seen: dict[str, str] = Variable.get(memory, default={})
    now = dict(seen)
    told, errors = [], []
    for key, (data, models) in data_sets(settings).items():
        try:
            now[key] = read_data_state(data)
        except UserError as error:
            errors.append(str(error))
            continue
        if seen.get(key, now[key]) != now[key]:
            told.append(f"the data set at {data.path} has changed")
            emit_event(
                DATASET_CHANGED,
                resource={"prefect.resource.id": f"lcmlora.{key}"},
                payload={"models": models, "path": data.path},
            )
    for model in settings.models:
        base, key = settings.base(model), f"base.{model}"
        try:
            now[key] = networked(read_base_state, settings)(model, settings)
        except UserError as error:
            errors.append(str(error))
            continue
        # A local base was used as it is; of the hub's, what is pinned.
        known = seen.get(key, base.revision or now[key])
        if now[key] not in (known, base.revision):
            pinned = f", and params.yaml pins {base.revision}" if base.revision else ""
            told.append(f"the base of {model}, {base.source}, is at {now[key][:12]} now{pinned}")
            payload: dict[str, object] = {
                "models": [model],
                "source": base.source,
                "revision": base.revision,
                "now": now[key],
            }
            emit_event(BASE_CHANGED, resource={"prefect.resource.id": f"lcmlora.base.{model}"}, payload=payload)
    if now != seen:
        # After the events: a watch that is killed in between tells twice, never not at all.
        Variable.set(memory, now, overwrite=True)
    for line in told:
        get_run_logger().info(line)
    if told:
        create_markdown_artifact("\n".join(f"* {line}" for line in told), key="changes")
    if errors:
        return Failed(message="\n".join(errors))
    return Completed(name="Changed" if told else "Unchanged", message="; ".join(told) or "as it was")


def data_sets(settings: config.Config) -> dict[str, tuple[config.Data, list[str]]]:
    """Returns the data sets with the models that learn from each, by their names in the flow's memory."""
    shared = {"dataset": (settings.data, settings.models_sharing_data())} if settings.uses_shared_data() else {}
    own = [model for model in settings.models if settings.has_own_data(model)]
    return shared | {f"dataset.{model}": (settings.data_for(model), [model]) for model in own}
