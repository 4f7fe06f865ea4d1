"""A registry of many versions, as years of nightly runs leave it, written into MLflow's database in bulk.

Every version has the tags, the events and the description that registration writes, and a run with the figures of a
real evaluation. Only the history of figures, which nothing here reads, is left out: the run has the last one of each.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, bindparam, create_engine, select

from lcmlora.config import Registry
from lcmlora.registry.events import LAST
from lcmlora.registry.listing import main_figures
from lcmlora.registry.listing.current import CHAMPION_RUN
from lcmlora.registry.lookup import PASSED, REJECTED
from lcmlora.registry.tracking import connect

EXCESS = "excess.student_4"
FEATURES = "efficientnet-lite0/320_128px"
_USER = "nightly"
_ROWS = 20_000  # in one statement


@dataclass(frozen=True)
class Made:
    """A version as it was made."""

    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]
    excess: float
    created: datetime.datetime

    @property
    def passed(self) -> bool:
        return self.tags["gate"] == PASSED


def model_name(number: int) -> str:
    return f"lcm-lora-model{number:03d}"


def fill(
    settings: Registry,
    models: int,
    nights: int,
    figures: Mapping[str, float],
    *,
    params: int = 3,
    former: bool = False,
) -> list[Made]:
    """Writes `nights` versions of each model into the settings' database, and returns them, the oldest first.

    Each night until yesterday every model got a version, of which three in four passed the gate and became champion.
    Models of odd numbers have the objective `tcd`, the others `lcm`.

    Args:
        figures: those of a run by their names in MLflow.
        params: how many settings a run has.
        former: without the tags that lists and reports search, as lcmlora 0.1.0 registered.
    """
    experiment = connect(settings).create_experiment(settings.experiment)
    made = list(_versions(models, nights, former))
    with create_engine(settings.tracking_uri).begin() as database:
        if database.dialect.name == "sqlite":
            database.exec_driver_sql("PRAGMA synchronous = OFF")
            database.exec_driver_sql("PRAGMA cache_size = -1000000")  # KiB
        _fill_runs(database, made, experiment, figures, params)
        _fill_registry(database, made, settings.alias, former)
    return made


def _fill_runs(
    database: Connection, made: Sequence[Made], experiment: str, figures: Mapping[str, float], params: int
) -> None:
    from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlParam, SqlRun, SqlTag

    _insert(database, SqlRun, (_run(each, experiment) for each in made))
    same = {"timestamp": _milliseconds(made[0].created), "step": 0, "is_nan": False}
    _give_each_run(database, SqlLatestMetric, [{"key": k, "value": v, **same} for k, v in figures.items()], made)
    _give_each_run(database, SqlParam, [{"key": f"setting{n:03d}", "value": "1"} for n in range(params)], made)
    _set_excess(database, SqlLatestMetric.__table__, figures, made)
    rows = ((each, tag) for each in made for tag in {**each.tags, "model": each.name}.items())
    _insert(database, SqlTag, ({"run_uuid": each.run_id, "key": key, "value": value} for each, (key, value) in rows))


def _fill_registry(database: Connection, made: Sequence[Made], alias: str, former: bool) -> None:
    from mlflow.store.model_registry.dbmodels import models as tables

    first = {each.name: each for each in reversed(made)}
    rows = ({"name": name, "creation_time": _milliseconds(each.created)} for name, each in first.items())
    _insert(database, tables.SqlRegisteredModel, rows)
    _insert(database, tables.SqlModelVersion, (_version(each) for each in made))
    rows = (
        {"name": each.name, "version": each.version, "key": key, "value": value}
        for each in made
        for key, value in each.tags.items()
    )
    _insert(database, tables.SqlModelVersionTag, rows)
    champions = {each.name: each for each in made if each.passed}
    rows = ({"name": name, "alias": alias, "version": each.version} for name, each in champions.items())
    _insert(database, tables.SqlRegisteredModelAlias, rows)
    if not former:
        rows = ({"name": name, "key": CHAMPION_RUN, "value": each.run_id} for name, each in champions.items())
        _insert(database, tables.SqlRegisteredModelTag, rows)


def _insert(database: Connection, table: Any, rows: Iterable[dict[str, Any]]) -> None:
    left = iter(rows)
    while some := list(itertools.islice(left, _ROWS)):
        database.execute(table.__table__.insert(), some)


def _give_each_run(database: Connection, model: Any, rows: list[dict[str, Any]], made: Sequence[Made]) -> None:
    """Inserts the same rows for every run: for the first one from here, for the others inside the database."""
    table: Table = model.__table__
    first = made[0].run_id
    database.execute(table.insert(), [{**row, "run_uuid": first} for row in rows])
    given, runs = table.alias(), table.metadata.tables["runs"]
    columns = [column.name for column in table.columns if column.name != "run_uuid"]
    copied = (
        select(*(given.c[name] for name in columns), runs.c.run_uuid)
        .select_from(given.join(runs, runs.c.run_uuid != given.c.run_uuid))
        .where(given.c.run_uuid == first, runs.c.user_id == _USER)
        .order_by(given.c.key, runs.c.run_uuid)  # as in the index, which is then written from end to end
    )
    database.execute(table.insert().from_select([*columns, "run_uuid"], copied))


def _set_excess(database: Connection, table: Table, figures: Mapping[str, float], made: Sequence[Made]) -> None:
    changed = table.update().where(table.c.key == bindparam("name"), table.c.run_uuid == bindparam("run"))
    names = [name for name in figures if name.endswith(f"/{EXCESS}")]
    rows = [{"name": name, "run": each.run_id, "excess": each.excess} for name in names for each in made]
    database.execute(changed.values(value=bindparam("excess")), rows)


def _versions(models: int, nights: int, former: bool) -> Iterator[Made]:
    drawn = random.Random(0)
    champions: dict[int, int] = {}
    first = datetime.datetime.now(datetime.UTC).replace(hour=2, minute=0) - datetime.timedelta(days=nights)
    for night in range(nights):
        for model in range(models):
            name, number = model_name(model), night + 1
            created = first + datetime.timedelta(days=night, seconds=20 * model)
            excess, passed = drawn.uniform(60, 120), drawn.random() < 0.75
            facts = _facts(model, number, "tcd" if model % 2 else "lcm", passed)
            past: list[tuple[dict[str, Any], int]] = [({"action": "registered"}, 1), ({"action": facts["gate"]}, 2)]
            if passed:
                promoted: dict[str, Any] = {"action": "promoted", "alias": "champion", "reason": "passed the gate"}
                past.append((promoted | ({"former": champions[model]} if model in champions else {}), 3))
                champions[model] = number
            tags = facts | dict(_event(fields, created + datetime.timedelta(seconds=later)) for fields, later in past)
            if not former:
                tags[LAST] = f"{created:%Y-%m-%d}"
                tags |= main_figures.tag(_main(excess))
            yield Made(name, number, _digest("run", model, number)[:32], tags, excess, created)


def _facts(model: int, number: int, objective: str, passed: bool) -> dict[str, str]:
    return {
        "sha256": _digest("released", model, number),
        "adapter": _digest("trained", model, number),
        "base": f"organisation/base-{model:03d}",
        "base_revision": _digest("revision", model)[:40],
        "base_digest": _digest("base", model),
        "base_unet": _digest("unet", model),
        "data_digest": _digest("latents", number),
        "data_dvc": f"{_digest('pictures', number)[:32]}.dir",
        "git_commit": _digest("commit", number)[:40],
        "git_dirty": "false",
        "lcmlora": "0.2.0",
        "dvc_lock": _digest("lock", number),
        "objective": objective,
        "features": FEATURES,
        "release_uri": f"s3://releases/team/model{model:03d}/sha256-{_digest('released', model, number)[:12]}",
        "device_seconds": "1432.5",
        "devices": "NVIDIA H100 80GB HBM3: 1432.5 s",
        "energy_kwh": "0.221",
        "price": "1.19 EUR",
        "gate": PASSED if passed else REJECTED,
        **({} if passed else {"gate_reason": "student@4: excess is worse than the champion's"}),
    }


def _event(fields: dict[str, Any], time: datetime.datetime) -> tuple[str, str]:
    return f"event.{time:%Y%m%dT%H%M%S.%f}Z", json.dumps(fields | {"who": _USER}, sort_keys=True)


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def _milliseconds(time: datetime.datetime) -> int:
    return int(time.timestamp() * 1000)


def _run(each: Made, experiment: str) -> dict[str, Any]:
    ended = _milliseconds(each.created)
    return {
        "run_uuid": each.run_id,
        "name": each.name,
        "source_type": "LOCAL",
        "user_id": _USER,
        "status": "FINISHED",
        "start_time": ended - 1_500_000,
        "end_time": ended,
        "lifecycle_stage": "active",
        "artifact_uri": f"s3://artifacts/{experiment}/{each.run_id}/artifacts",
        "experiment_id": int(experiment),
    }


def _version(each: Made) -> dict[str, Any]:
    time = _milliseconds(each.created)
    return {
        "name": each.name,
        "version": each.version,
        "creation_time": time,
        "last_updated_time": time,
        "description": "Acceleration adapter of a base, with a table of its figures and a contact sheet.\n" * 10,
        "current_stage": "None",
        "source": f"runs:/{each.run_id}/model",
        "storage_location": f"s3://artifacts/{each.run_id}/model",
        "run_id": each.run_id,
        "status": "READY",
    }


def _main(excess: float) -> dict[str, float]:
    """Returns the main figures of a run, at the numbers of steps that every evaluation has."""
    names = [f"{FEATURES}/{name}.student_{steps}" for name in ("excess", "retrieval") for steps in (1, 2, 4, 8, 16)]
    return dict.fromkeys(names, 0.59) | {f"{FEATURES}/{EXCESS}": excess}
