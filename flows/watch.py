"""The flow that notices changes of data sets and bases, and emits events on which a deployment retrains."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds
    from lcmlora.flows.verbs import standalone, watch

    standalone("flows.watch", watch)

import datetime
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import State, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.events.schemas.events import Event
from prefect.states import Completed, Failed

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows import memory, production_prompts
from lcmlora.flows.memory import Entry, Memory
from lcmlora.flows.notices import links, rounds
from lcmlora.tasks.outages.own_state import outlasting
from lcmlora.tasks.retrying import networked
from lcmlora.tasks.watched_inputs import read_base_state, read_data_state

DATASET_CHANGED = "lcmlora.dataset.changed"
BASE_CHANGED = "lcmlora.base.changed"
PROMPTS_DRIFTED = "lcmlora.prompts.drifted"

_KEPT_DAYS = 30  # after the last look at an input, such as a base that is not among the models any more


@flow(name="watch")
def watch_inputs(params: str = "params.yaml") -> State:
    """Emits `lcmlora.dataset.changed` and `lcmlora.base.changed` for each change. Ends as Changed or Unchanged.

    If `serving.keep_prompts` is text, it emits `lcmlora.prompts.drifted` when a model's prompts begin to drift from the
    training captions.

    Pictures and local bases are compared with their state at the last run of this flow; the first run only remembers
    it. A base on the hub is compared with the revision that params.yaml pins: a new commit is reported, and used only
    when a person pins it.

    A change is kept before its event is sent, and marked as told when Prefect has taken the event. So no event is lost
    if the flow is killed at any moment: the next run sends it again, at most once more, with the same id.

    It also tells the targets of `notify` what nobody else tells: see `rounds.quarter_hourly`.

    Args:
        params: the file with the settings.
    """
    try:
        settings = config.load(Path(params))
    except UserError as error:
        return Failed(message=str(error))
    with outlasting(settings.flow.patience):
        changes, errors = look(settings)
        rounds.quarter_hourly(settings)
    for line in changes:
        get_run_logger().info(line)
    if changes:
        create_markdown_artifact("\n".join(f"* {line}" for line in changes), key="changes")
    if errors:
        return Failed(message="\n".join(errors))
    return Completed(name="Changed" if changes else "Unchanged", message="; ".join(changes) or "nothing has changed")


def look(settings: config.Config) -> tuple[list[str], list[str]]:
    """Compares every data set and base with what was remembered of it, and tells Prefect of each change.

    Returns:
        Changes and errors, a line for each.
    """
    remembered = Memory("watch", settings)
    entries = remembered.read()
    with memory.former(settings) as states:
        for key in states.keys() - entries.keys():
            entries[key] = {"seen": states[key], "day": _today()}
            remembered.write(key, entries[key])
    changes, errors = [], []
    inputs = list(_inputs(settings))
    for each in inputs:
        try:
            line = _compare(each, each.read(settings), entries.get(each.key), remembered)
        except UserError as error:
            errors.append(str(error))
        except httpx.HTTPError as error:
            errors.append(f"{each.key}: Prefect did not take what has changed: {error}; the next look tells it again")
        else:
            changes += [line] if line else []
    oldest = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=_KEPT_DAYS)).date().isoformat()
    for key in entries.keys() - {each.key for each in inputs}:
        # Not at once: another clone of the project may still have it among its models.
        if str(entries[key].get("day", "")) < oldest:
            remembered.forget(key)
    return changes, errors


@dataclass(frozen=True)
class _Data:
    """A data set as an input that is watched."""

    key: str  # in the memory, and as Prefect's resource
    data: config.Data
    models: list[str]

    event = DATASET_CHANGED
    pinned = None

    def read(self, settings: config.Config) -> str:
        return read_data_state(self.data)

    def change(self, now: str) -> tuple[str, dict[str, Any]]:
        """Returns the line that tells of a change, and the event's payload."""
        return f"the data set at {self.data.path} has changed", {"models": self.models, "path": self.data.path}


@dataclass(frozen=True)
class _Base:
    """A model's base as an input that is watched."""

    key: str
    model: str
    source: str
    pinned: str | None  # the revision in params.yaml

    event = BASE_CHANGED

    def read(self, settings: config.Config) -> str:
        return networked(read_base_state, settings)(self.model, settings)

    def change(self, now: str) -> tuple[str, dict[str, Any]]:
        """Returns the line that tells of a change, and the event's payload."""
        pinned = f", and params.yaml pins {self.pinned}" if self.pinned else ""
        payload = {"models": [self.model], "source": self.source, "revision": self.pinned, "now": now}
        return f"the base of {self.model}, {self.source}, is at {now[:12]} now{pinned}", payload


@dataclass(frozen=True)
class _Prompts:
    """What production asks of a model, as an input that is watched."""

    key: str
    model: str

    event = PROMPTS_DRIFTED
    pinned = production_prompts.NO_DRIFT

    def read(self, settings: config.Config) -> str:
        return production_prompts.drift_state(self.model, settings)

    def change(self, now: str) -> tuple[str, dict[str, Any]]:
        """Returns the line that tells of a change, and the event's payload; no word of a prompt."""
        payload = {"models": [self.model], "days": now}
        return f"the prompts of {self.model} have drifted from its training captions: {now}", payload


def _inputs(settings: config.Config) -> Iterator[_Data | _Base | _Prompts]:
    for key, (data, models) in data_sets(settings).items():
        yield _Data(key, data, models)
    for model in settings.models:
        base = settings.base(model)
        yield _Base(f"base.{model}", model, base.source, base.revision)
        if settings.serving.keep_prompts == "text":
            yield _Prompts(f"prompts.{model}", model)


def data_sets(settings: config.Config) -> dict[str, tuple[config.Data, list[str]]]:
    """Returns each data set and the models that learn from it, by its name in the flow's memory."""
    shared = {"dataset": (settings.data, settings.models_sharing_data())} if settings.uses_shared_data() else {}
    own = [model for model in settings.models if settings.has_own_data(model)]
    return shared | {f"dataset.{model}": (settings.data_for(model), [model]) for model in own}


def _compare(each: _Data | _Base | _Prompts, now: str, entry: Entry | None, remembered: Memory) -> str | None:
    """Keeps an input's present state, tells Prefect if it has changed, and returns the line that says so.

    The entry has `seen`, the state that was told last, and from before an event is sent until Prefect has taken it
    `pending`, the state that is being told, and `event`, the event's id.
    """
    # At the first run, a base of the hub is compared with its pinned revision; all else is only remembered.
    seen = (each.pinned or now) if entry is None else entry.get("seen")
    pending = entry.get("pending") if entry else None
    today = _today()
    # A change back while an event may be on its way is told, too: the event may have started a run.
    if now == each.pinned or (now == seen and pending is None):
        if entry != (kept := {"seen": now, "day": today}):
            remembered.write(each.key, kept)
        return None
    again = pending == now
    event = str(entry["event"]) if again and entry and entry.get("event") else str(uuid.uuid4())
    if not again:
        remembered.write(each.key, {"seen": seen, "pending": now, "event": event, "day": today})
    line, payload = each.change(now)
    _send(each.event, f"lcmlora.{each.key}", payload, uuid.UUID(event))
    remembered.write(each.key, {"seen": now, "day": today})
    return line + (" (told again, since the look that noticed it was ended before it had kept that)" if again else "")


def _send(name: str, resource: str, payload: dict[str, Any], identity: uuid.UUID) -> None:
    """Returns when Prefect has taken the event, other than `emit_event`, which puts it into a queue of this process.

    Raises:
        httpx.HTTPError: Prefect does not answer, or refuses.
    """
    run = links.flow_run()
    about = {"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.role": "flow-run"}
    event = Event.model_validate(
        {
            "id": identity,
            "event": name,
            "occurred": datetime.datetime.now(datetime.UTC),
            "resource": {"prefect.resource.id": resource, "lcmlora.project": memory.project()},
            "related": [about] if run else [],
            "payload": payload,
        }
    )
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
