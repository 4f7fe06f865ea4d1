"""Pruning over http: versions and runs on an MLflow server with PostgreSQL, artifacts and releases in buckets."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from lcmlora import registry
from lcmlora.config import Publish, Registry
from lcmlora.errors import NotFound
from lcmlora.registry import promotion, registration
from lcmlora.registry.retention import database, plan, removal
from lcmlora.registry.retention.selection import Rules
from lcmlora.registry.tracking import log_run
from lcmlora.releases import catalog, publish
from lcmlora.settings.services import Retention
from tests.integration.seaweed import SeaweedFS
from tests.integration.tracking_servers import MLflow, PostgreSQL
from tests.support.releases import write_sealed

pytestmark = pytest.mark.integration

NOW = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=100)


def objects(s3: SeaweedFS, bucket: str, part: str) -> list[str]:
    pages = s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [entry["Key"] for page in pages for entry in page.get("Contents", []) if part in entry["Key"]]


@pytest.mark.slow
def test_versions_artifacts_and_releases_go_over_http_and_the_rows_where_the_database_can_be_reached(
    mlflow_server: MLflow,
    postgresql: PostgreSQL,
    s3: SeaweedFS,
    bucket: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = Registry(tracking_uri=mlflow_server.uri, experiment="retention", alias="champion")
    made = []
    for name in ("one", "two", "three"):
        folder = write_sealed(tmp_path / name, weights=name.encode(), model="pruned")
        uri = publish.publish_release(folder, "pruned", bucket)
        made.append(registration.register_release("pruned", settings, folder, uri))
    promotion.promote_passed(made[1], settings, reason="passed")
    publish.point_channel("pruned", made[1].sha256, bucket)
    with log_run(settings, "pruned", {}) as run:
        assert run.id
    run_id = registry.resolve("pruned/1", settings).run_id
    assert len(objects(s3, mlflow_server.bucket, run_id)) > 20

    rules = Rules(Retention(versions=1, days=30), NOW)
    found = plan.make_plan(settings, bucket, ["pruned"], rules)
    assert [each.version.version for each in found.versions] == [1]
    assert [len(found.runs), found.versions[0].releases[0].files] == [1, 8]
    assert (found.versions[0].artifact_bytes or 0) > 10_000
    remover = removal.Remover(settings, bucket, "ada")
    assert remover.remove_version(found.versions[0])
    remover.remove_run(found.runs[0])
    assert objects(s3, mlflow_server.bucket, run_id) == []
    prefix = f"sha256-{made[0].sha256[:12]}"
    assert objects(s3, bucket.to.split("/")[2], prefix) == []
    with pytest.raises(NotFound, match="lcm-lora-pruned/1: was pruned on"):
        registry.pull("pruned/1", settings)
    registry.pull("pruned@champion", settings, everything=True)
    catalog.verify_release("pruned@champion", bucket)

    assert database.database_of(settings) is None
    again = plan.make_plan(settings, bucket, ["pruned"], rules)
    assert again.versions == again.runs == again.unfinished == ()
    assert any(run_id in row for row in postgresql.rows("mlflow"))
    monkeypatch.setenv(database.VARIABLE, postgresql.uri("mlflow"))
    direct = settings.model_copy(update={"tracking_uri": database.database_of(settings)})
    assert database.delete_rows(direct, ["lcm-lora-pruned"]) == 3  # a version and two runs
    assert not any(run_id in row for row in postgresql.rows("mlflow"))
    assert database.space(direct) is None and database.compact(direct) is None
    assert [version.version for version in registry.versions(settings, "lcm-lora-pruned")] == [3, 2]
