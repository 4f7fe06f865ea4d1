"""Undocumented parts of MLflow that lcmlora relies on. tests/test_internals.py tests each of them.

A served model's requirements pin the version of MLflow that these parts were tested with.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

VERSION = "3.17"  # that this was written against

Application = Callable[[Any, Any, Any], Awaitable[None]]  # ASGI

SCORING_APPLICATION = "mlflow.pyfunc.scoring_server.app"  # the module in which `mlflow models serve` makes its `app`


def guard_next_application(guard: Callable[[Application], Application]) -> bool:
    """Puts a guard around the application that `mlflow models serve` makes next.

    That module makes its FastAPI application right after it has loaded the model, and offers no hook. So the class
    FastAPI is replaced until that application is made.

    Args:
        guard: returns an application that wraps the given one.

    Returns:
        False where another program loads the model; nothing is replaced then.
    """
    module = sys.modules.get(SCORING_APPLICATION)
    if module is None or hasattr(module, "app"):
        return False
    import fastapi

    plain = fastapi.FastAPI

    class Guarded(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            fastapi.FastAPI = plain  # type: ignore[misc]  # this application and no other
            super().__init__(*arguments, **settings)
            self._guarded = guard(super().__call__)

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self._guarded(scope, receive, send)

    fastapi.FastAPI = Guarded  # type: ignore[misc]
    return True


def start_system_monitor(run_id: str, tracking_uri: str, seconds: float) -> Any:
    """Starts and returns MLflow's monitor, which logs CPU, memory, disk, network and GPU as `system/...` metrics.

    MLflow documents it only for the process's active run, and lcmlora sets none.

    Args:
        seconds: between two measurements.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=tracking_uri)
    monitor.start()
    return monitor


def server_with_passwords() -> Any:
    """Returns the ASGI application of MLflow's server with passwords."""
    from mlflow.server.auth import create_app

    return create_app()


def is_of_database(client: Any) -> bool:
    """Returns whether a client reads a database itself; one of a server may lack SQLAlchemy."""
    return hasattr(client._get_registry_client().store, "engine")


def search_versions(client: Any, search: str | None, order: Sequence[str], size: int, token: str | None) -> Any:
    """Returns a page of versions as `MlflowClient.search_model_versions` does, without their aliases.

    In a database, MLflow makes an object of SQLAlchemy of each tag, and one of its own of that: 0.4 milliseconds for a
    version with 25 tags. Here the same search returns rows, whose tags are looked up at once.

    Args:
        client: of a server or a database.
        search, order, size, token: filter_string, order_by, max_results and page_token of MLflow's method.
    """
    if not is_of_database(client):
        return client.search_model_versions(search, max_results=size, order_by=list(order), page_token=token)
    from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL
    from mlflow.store.entities import PagedList
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersion as Row
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersionTag as Tag
    from mlflow.utils.search_utils import SearchModelVersionUtils
    from sqlalchemy import and_, select

    store = client._get_registry_client().store
    offset = SearchModelVersionUtils.parse_start_offset_from_page_token(token)
    wanted = SearchModelVersionUtils.parse_search_filter(search)
    found = (
        store._get_search_model_versions_filter_clauses(wanted, store.engine.dialect.name)
        .filter(Row.current_stage != STAGE_DELETED_INTERNAL)
        .order_by(*store._parse_search_model_versions_order_by(list(order)))
        .limit(size + 1)
        .offset(offset)
    )
    keys = [Row.workspace, Row.name, Row.version]
    chosen = found.with_only_columns(*keys).subquery()
    same = and_(*(chosen.c[each.key] == getattr(Tag, each.key) for each in keys))
    tags = select(Tag.name, Tag.version, Tag.key, Tag.value)
    with store.engine.connect() as database:
        rows = database.execute(found.with_only_columns(*Row.__table__.columns)).all()
        of = _by_version(database.execute(tags.join(chosen, same)).all())
        # A version that was made in between took the place of another one, or this one never had a tag.
        if lacking := {row.name for row in rows if (row.name, row.version) not in of}:
            theirs = tags.where(Tag.workspace == store._get_active_workspace(), Tag.name.in_(lacking))
            of |= _by_version(database.execute(theirs).all())
    versions = [_version(row, of.get((row.name, row.version), [])) for row in rows[:size]]
    return PagedList(versions, store._compute_next_token(size + 1, len(rows), offset, size))


def _by_version(rows: Sequence[Any]) -> dict[tuple[str, int], list[Any]]:
    """Returns MLflow's tags of each version, of rows of name, version, key and value."""
    from mlflow.entities.model_registry import ModelVersionTag

    of: dict[tuple[str, int], list[Any]] = {}
    for name, version, key, value in rows:
        of.setdefault((name, version), []).append(ModelVersionTag(key, value))
    return of


def _version(row: Any, tags: list[Any]) -> Any:
    """Returns MLflow's version of a row of its table."""
    from mlflow.entities.model_registry import ModelVersion

    return ModelVersion(
        row.name,
        row.version,
        row.creation_time,
        row.last_updated_time,
        description=row.description,
        user_id=row.user_id,
        current_stage=row.current_stage,
        source=row.source,
        run_id=row.run_id,
        status=row.status,
        status_message=row.status_message,
        tags=tags,
        run_link=row.run_link,
        workspace=row.workspace,
    )


def delete_rows(client: Any, run_ids: Sequence[str], names: Collection[str]) -> int:
    """Deletes for good, from a database, what MLflow has only marked as deleted, as `mlflow gc` does for runs.

    MLflow offers this for runs alone, and leaves their inputs, and a deleted version with all of its tags, for ever.

    Args:
        client: of the database itself, not of a server.
        run_ids: deleted runs, whose artifacts are gone.
        names: registered models, whose deleted versions go. The one with the highest number stays, so that no number
            is given twice.

    Returns:
        How many runs and versions were deleted.
    """
    from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL
    from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
    from mlflow.store.tracking.dbmodels.models import SqlInput, SqlInputTag
    from sqlalchemy import func

    tracking, versions = client._tracking_client.store, client._get_registry_client().store
    for run_id in run_ids:
        with tracking.ManagedSessionMaker(read_only=False) as session:
            inputs = session.query(SqlInput).filter(SqlInput.destination_id == run_id).all()
            for each in inputs:
                session.query(SqlInputTag).filter(SqlInputTag.input_uuid == each.input_uuid).delete()
                session.delete(each)
        tracking._hard_delete_run(run_id)
    count = len(run_ids)
    with versions.ManagedSessionMaker(read_only=False) as session:
        for name in names:
            highest = session.query(func.max(SqlModelVersion.version)).filter(SqlModelVersion.name == name).scalar()
            gone = session.query(SqlModelVersion).filter(
                SqlModelVersion.name == name,
                SqlModelVersion.current_stage == STAGE_DELETED_INTERNAL,
                SqlModelVersion.version < (highest or 0),
            )
            for version in gone.all():
                session.delete(version)  # its tags follow
                count += 1
    return count
