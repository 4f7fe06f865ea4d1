"""The revisions of a database's tables: which it has, and which an installed package knows. Alembic keeps both."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sqlite3
from pathlib import Path

from lcmlora import masking
from lcmlora.errors import UserError
from lcmlora.io.terminal import joined


def of_file(path: Path) -> str | None:
    """Returns the revision of an sqlite database's tables, None where there is no such file or it has none."""
    if not path.is_file():
        return None
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
        ) as database:
            tables = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
            row = database.execute("SELECT version_num FROM alembic_version").fetchone() if tables else None
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}") from None
    return None if row is None else str(row[0])


def of_server(uri: str) -> str | None:
    """Returns the revision of the tables of a database on a server, as `of_file`."""
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.exc import SQLAlchemyError

    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            if "alembic_version" not in inspect(connection).get_table_names():
                return None
            row = connection.execute(text("SELECT version_num FROM alembic_version")).fetchone()
    except SQLAlchemyError as error:
        raise UserError(f"{masking.address(uri)}: {masking.text(joined(error))}") from None
    finally:
        engine.dispose()
    return None if row is None else str(row[0])


def known(package: str, folder: str) -> dict[str, tuple[str, ...]]:
    """Returns the revisions of a package's migrations, each with those before it, without importing the package.

    There are none where the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    found: dict[str, tuple[str, ...]] = {}
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(root, folder).glob("*.py"):
            values = _constants(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(revision := values.get("revision"), str):
                former = values.get("down_revision")
                several = former if isinstance(former, tuple | list) else (former,) if former else ()
                found[revision] = tuple(map(str, several))
    return found


def _constants(module: ast.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name) and target.id in ("revision", "down_revision"):
                found[target.id] = ast.literal_eval(statement.value)
    return found
