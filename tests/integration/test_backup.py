"""Backup and restore with the servers that hold the data: SeaweedFS, PostgreSQL, and all of `lcmlora up`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcmlora.errors import UserError
from lcmlora.flows.backup import archive, databases, objects
from tests.integration.seaweed import SeaweedFS
from tests.integration.tracking_servers import PASSWORD, PostgreSQL
from tests.support.releases import write_sealed

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def test_objects_come_back_with_their_bytes_metadata_tags_and_headers(s3: SeaweedFS, tmp_path: Path):
    client = s3.client()
    for bucket in ("backed-up", "restored"):
        client.create_bucket(Bucket=bucket)
    large, shared = os.urandom(3 << 20), b"the same weights"
    client.put_object(Bucket="backed-up", Key="a/large", Body=large, ContentType="image/png", Metadata={"who": "ada"})
    for key in ("b/one", "c/two with a space+"):
        client.put_object(Bucket="backed-up", Key=key, Body=shared, Tagging="team=imaging")
    versions = objects.versions(client, "backed-up")
    assert set(versions) == {"a/large", "b/one", "c/two with a space+"}
    stored = {key: objects.fetch(client, "backed-up", key, tmp_path) for key in versions}
    assert objects.fetch(client, "backed-up", "deleted meanwhile", tmp_path) is None
    contents = [path for path in (tmp_path / archive.OBJECTS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in contents) == len(large) + len(shared)  # each content once
    for key, each in stored.items():
        assert each is not None
        objects.put(client, "restored", key, each, tmp_path)
    found = client.get_object(Bucket="restored", Key="a/large")
    assert found["Body"].read() == large
    assert (found["ContentType"], found["Metadata"]) == ("image/png", {"who": "ada"})
    tags = client.get_object_tagging(Bucket="restored", Key="b/one")["TagSet"]
    assert tags == [{"Key": "team", "Value": "imaging"}]
    # Something else at an unchanged key is another version.
    client.put_object(Bucket="backed-up", Key="b/one", Body=b"other")
    assert objects.versions(client, "backed-up")["b/one"] != versions["b/one"]


def test_a_postgresql_registry_comes_back_into_an_empty_database_and_into_no_other(
    postgresql: PostgreSQL, tmp_path: Path
):
    databases.require_postgresql_tool("pg_dump")
    for name in ("backed_up", "restored"):
        postgresql.create(name)
    with contextlib.closing(postgresql._connect("backed_up")) as connection, connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE model_versions (name text); INSERT INTO model_versions VALUES ('lcm-lora-mini')")
    databases.dump_postgresql(postgresql.uri("backed_up"), tmp_path / "dump")
    assert (tmp_path / "dump").stat().st_mode & 0o777 == 0o600
    databases.restore_postgresql(tmp_path / "dump", postgresql.uri("restored"))
    assert postgresql.rows("restored") == ["(lcm-lora-mini)"]
    with pytest.raises(UserError, match=r"has 1 tables, which a restore would overwrite") as refused:
        databases.restore_postgresql(tmp_path / "dump", postgresql.uri("restored"))
    with pytest.raises(UserError) as wrong:
        databases.dump_postgresql(postgresql.uri("no such database"), tmp_path / "none")
    assert PASSWORD not in str(refused.value) + str(wrong.value)


FILL = """
import sys
from pathlib import Path
from lcmlora import config
from lcmlora.registry import promotion, registration
from lcmlora.releases import publish
settings, sealed = config.load(), Path(sys.argv[1])
uri = publish.publish_release(sealed, "mini", settings.publish)
version = registration.register_release("mini", settings.registry, sealed, uri)
promotion.promote_passed(version, settings.registry, reason="first")
publish.point_channel("mini", version.sha256, settings.publish)
print(version.sha256)
"""

LOOK_UP = """
import json
from pathlib import Path
from lcmlora import config, registry
from lcmlora.releases import catalog
settings = config.load()
champion = registry.resolve("mini@champion", settings.registry)
folder = registry.pull("mini@champion", settings.registry, Path("pulled"))
weights = (Path(folder) / "pytorch_lora_weights.safetensors").read_text()
print(json.dumps([champion.sha256, champion.release_uri, weights]))
"""


def run(project: Path, *arguments: str, **variables: str) -> str:
    """Runs Python in a project and returns what it prints."""
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "LCMLORA_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def exported(project: Path) -> dict[str, str]:
    found: dict[str, Any] = json.loads((project / ".up/state.json").read_text())
    return dict(found["exported"])


@pytest.mark.slow
def test_all_of_up_comes_back_into_an_empty_folder_and_is_looked_up_there(tmp_path: Path):
    """The backup is made while the servers work; then their data is deleted."""
    project, elsewhere, backups = (tmp_path / name for name in ("project", "elsewhere", "backups"))
    project.mkdir()
    elsewhere.mkdir()
    for name in ("params.yaml", "prefect.yaml"):
        shutil.copy(ROOT / name, project)
    sealed = write_sealed(tmp_path / "release")
    stack, verbs = ("-m", "lcmlora.flows.stack"), ("-m", "lcmlora.flows.backup.verbs")
    try:
        run(project, *stack, "up")
        servers = exported(project)
        sha256 = run(project, "-c", FILL, str(sealed), **servers).split()[-1]
        before = json.loads((project / ".up/state.json").read_text())["started"]
        place = Path(run(project, *verbs, "backup", str(backups), **servers).split()[-1])
        assert json.loads((project / ".up/state.json").read_text())["started"] == before  # nothing was started again
    finally:
        run(project, *stack, "down")
    manifest = archive.read(place)
    keys = manifest.buckets["lcmlora"]
    assert {"releases/mini/channels/champion.json"} <= keys.keys()
    assert [key for key in keys if key.startswith("mlflow/")]
    shutil.rmtree(project)
    try:
        run(elsewhere, *verbs, "restore", str(backups))
        run(elsewhere, *stack, "up")
        servers = exported(elsewhere)
        found = json.loads(run(elsewhere, "-c", LOOK_UP, **servers))
        assert found == [sha256, f"s3://lcmlora/releases/mini/sha256-{sha256[:12]}", "weights"]
        pointer = run(elsewhere, "-m", "lcmlora", "releases", "list", **servers)
        assert "champion" in pointer
    finally:
        run(elsewhere, *stack, "down")
