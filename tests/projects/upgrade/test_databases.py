"""Databases of an earlier MLflow or Prefect: found without importing either, and changed after a backup."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config as Alembic
from typer.testing import CliRunner

from lcmlora.cli.main import app
from lcmlora.errors import UserError
from lcmlora.flows.backup import archive
from lcmlora.project import Project
from lcmlora.projects.databases import outdated as databases
from lcmlora.projects.databases import revisions
from tests.projects.upgrade import former
from tests.support.registries import fresh

URI = "sqlite:///mlflow.db"


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    fresh(tmp_path, tmp_path_factory)
    return Project(tmp_path)


def revision(path: Path, now: str | None = None) -> str:
    """Returns the revision that a database says, after setting it to `now`."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        if now is not None:
            connection.execute("UPDATE alembic_version SET version_num = ?", (now,))
        (found,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(found)


def test_what_the_installed_mlflow_has_made_is_not_changed(project: Project):
    assert databases.outdated(project, URI) == []
    assert databases.outdated(project, "https://mlflow.example.org") == []


def test_a_database_of_an_earlier_release_is_named_with_both_revisions(project: Project):
    path = project.root / "mlflow.db"
    newest = revision(path)
    (before,) = revisions.known(*databases.MLFLOW)[newest]
    revision(path, before)
    (found,) = databases.outdated(project, URI)
    assert (found.owner, found.revision, found.wanted) == ("MLflow", before, newest)
    assert str(found) == f"{path}: MLflow's tables are of revision {before}, and become those of {newest}"


def test_a_database_of_a_later_release_is_refused(project: Project):
    revision(project.root / "mlflow.db", "ffffffffffff")
    with pytest.raises(UserError, match="which the installed MLflow does not know; install the version of MLflow"):
        databases.outdated(project, URI)


def test_nothing_is_changed_while_servers_have_the_databases_open(project: Project):
    (project.root / ".up").mkdir()
    state = project.root / ".up/state.json"
    state.write_text(json.dumps({"started": {"mlflow": {"pid": 1, "digest": "a"}}}))
    with pytest.raises(UserError, match="`lcmlora down`, then upgrade again"):
        databases.refuse_running(project)
    state.write_text(json.dumps({"started": {}}))
    databases.refuse_running(project)


@pytest.mark.slow
def test_an_upgrade_makes_a_backup_and_changes_the_databases_of_mlflow_and_prefect(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    root = former_project(tmp_path / "owls", tmp_path_factory)
    for path, package, folder in (
        (root / "mlflow.db", "mlflow", "store/db_migrations"),
        (root / ".up/prefect/prefect.db", "prefect", "server/database/_migrations"),
    ):
        if path.name == "prefect.db":
            path.parent.mkdir(parents=True)
            (name,) = revisions.known(*databases.PREFECT).keys() & {"f416ea180ae1"}
            with contextlib.closing(sqlite3.connect(path)) as connection, connection:
                connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
                connection.execute("INSERT INTO alembic_version VALUES (?)", (name,))
                connection.execute("CREATE TABLE flow_run (state_type TEXT, start_time TEXT, expected_start_time TEXT)")
        else:
            location = importlib.util.find_spec(package)
            assert location is not None and location.submodule_search_locations
            settings = Alembic()
            settings.set_main_option("script_location", str(Path(location.submodule_search_locations[0], folder)))
            settings.set_main_option("sqlalchemy.url", f"sqlite:///{path}")
            command.downgrade(settings, "-1")
    before = {name: revision(root / name) for name in ("mlflow.db", ".up/prefect/prefect.db")}
    done = CliRunner().invoke(app, ["--project", str(root), "upgrade", "--no-estimate", "--yes"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert databases.outdated(Project(root), URI) == []
    assert all(revision(root / name) != was for name, was in before.items())
    kept = archive.find(root / databases.BACKUPS)
    assert {name: revision(kept / "files" / name) for name in before} == before


def former_project(root: Path, factory: pytest.TempPathFactory) -> Path:
    made = former.make(root)
    fresh(made, factory)
    return made
