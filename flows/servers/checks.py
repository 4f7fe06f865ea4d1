"""What the deployments of a prefect.yaml must be, checked before Prefect reads them.

Prefect tells a mistake in many lines once the servers run, and ignores a key that it does not know: with `timezon` a
schedule fires in UTC, and with `expects` a trigger fires at every event.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.events.schemas import deployment_triggers as triggers
from pydantic import BaseModel, ValidationError

from lcmlora.errors import UserError
from lcmlora.flows.servers.definitions import entries
from lcmlora.io.parsing import JsonObject, as_object
from lcmlora.settings import layers

_SCHEDULES: Mapping[str, type[BaseModel]] = {"cron": CronSchedule, "interval": IntervalSchedule, "rrule": RRuleSchedule}
_TRIGGERS: Mapping[str, type[BaseModel]] = {
    "event": triggers.DeploymentEventTrigger,
    "metric": triggers.DeploymentMetricTrigger,
    "compound": triggers.DeploymentCompoundTrigger,
    "sequence": triggers.DeploymentSequenceTrigger,
}

# Those that Prefect looks for beside the ones of _Deployment.
_OF_DEPLOYMENTS = ("build", "concurrency_options", "flow_name", "path", "pull", "push", "schedule", "sla")


class _Schedule(BaseModel):
    """What a schedule of every kind may have."""

    active: bool | None = None
    parameters: dict[str, Any] | None = None
    replaces: str | None = None
    slug: str | None = None


class _WorkPool(BaseModel):
    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] | None = None


class _Deployment(BaseModel):
    entrypoint: str
    name: str
    description: str | None = None
    version: str | None = None
    version_type: str | None = None
    tags: list[str] | None = None
    parameters: dict[str, Any] | None = None
    paused: bool | None = None
    enforce_parameter_schema: bool | None = None
    concurrency_limit: int | None = None  # or a ConcurrencyLimitConfig
    work_pool: dict[str, Any] | None = None  # as _WorkPool
    schedules: list[Any] | None = None
    triggers: list[Any] | None = None


def check_deployments(path: Path) -> None:
    """Raises UserError if Prefect would refuse a deployment of prefect.yaml or ignore a key that was probably misspelt.

    What has a variable or a block in it is Prefect's to read. Raises UserError, too, where there is no list of
    deployments.
    """
    for entry in entries(path):
        with _told_of(f"{path}: {entry.get('entrypoint')}, {entry.get('name')}"):
            limit = entry.get("concurrency_limit")
            if isinstance(limit, dict):
                _check(ConcurrencyLimitConfig, limit, "concurrency_limit")
                limit = None
            _check(_Deployment, {**entry, "concurrency_limit": limit}, "", _OF_DEPLOYMENTS)
            if isinstance(pool := entry.get("work_pool"), dict):
                _check(_WorkPool, pool, "work_pool")
            for number, schedule in enumerate(_listed(entry, "schedules")):
                _check_schedule(schedule, f"schedules.{number}")
            for number, trigger in enumerate(_listed(entry, "triggers")):
                _check_trigger(trigger, f"triggers.{number}")


def _listed(values: JsonObject, key: str) -> list[Any]:
    """Returns the list of this key; none if it has something else, which is a variable or was told."""
    found = values.get(key)
    return found if isinstance(found, list) else []


@contextlib.contextmanager
def _told_of(deployment: str) -> Iterator[None]:
    """Says in each line of a UserError which deployment it is of."""
    try:
        yield
    except UserError as error:
        raise UserError("\n".join(f"{deployment}: {line}" for line in str(error).splitlines())) from None


def _check_schedule(schedule: object, where: str) -> None:
    values = as_object(schedule, where)
    found = [kind for kind in _SCHEDULES if kind in values]
    if len(found) != 1:
        given = f", and there are {' and '.join(found)}" if found else ""
        raise UserError(f"{where}: expected one of {', '.join(_SCHEDULES)}{given}")
    kind = _SCHEDULES[found[0]]
    _check(kind, values, where, _Schedule.model_fields)
    _check(_Schedule, values, where, kind.model_fields)


def _check_trigger(trigger: object, where: str) -> None:
    values = as_object(trigger, where)
    kind = str(triggers.deployment_trigger_discriminator(values))
    if kind not in _TRIGGERS:
        raise UserError(f"{where}.type: got {kind!r}: expected {', '.join(_TRIGGERS)}")
    for number, each in enumerate(_listed(values, "triggers")):
        _check_trigger(each, f"{where}.triggers.{number}")
    _check(_TRIGGERS[kind], values, where)


def _check(kind: type[BaseModel], values: JsonObject, where: str, others: Collection[str] = ()) -> None:
    """Raises UserError if values are none of this kind, or have a key that is nearly one of its or of the others."""
    known = [*kind.model_fields, *others]
    for key in values.keys() - known:
        if meant := layers.meant(str(key), known):
            raise UserError(f"{f'{where}.' if where else ''}{key}: there is no such key{meant}")
    own = {key: value for key, value in values.items() if key in kind.model_fields and "{{" not in str(value)}
    left = values.keys() - own
    if any(field.is_required() and name in left for name, field in kind.model_fields.items()):
        return
    try:
        kind.model_validate(own)
    except ValidationError as error:
        raise UserError(layers.explain(error, kind, lambda location: where)) from None
