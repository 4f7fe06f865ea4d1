"""Another user of this machine against the servers of `make up`: nothing is read, nothing is changed."""

from __future__ import annotations

import os
import ssl
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lcmlora.flows import services
from lcmlora.flows.credentials import Login
from tests.integration import stranger
from tests.integration.seaweed import SeaweedFS
from tests.integration.tracking_servers import MLFLOW, PREFECT, MLflow, PrefectServer

pytestmark = pytest.mark.integration

ELSEWHERE = "http://evil.example"
NEIGHBOUR = "http://localhost:1"  # a page that another user serves on this machine

PREFECT_REQUESTS = [
    ("POST", "/api/flows/filter"),
    ("POST", "/api/deployments/filter"),
    ("POST", "/api/flow_runs/"),
    ("POST", "/api/deployments/00000000-0000-0000-0000-000000000000/create_flow_run"),
    ("POST", "/api/work_pools/"),
    ("POST", "/api/variables/"),
    ("POST", "/api/logs/filter"),
    ("POST", "/api/events"),
    ("POST", "/api/block_documents/filter"),
    ("POST", "/api/ui/flows/count-deployments"),
    ("GET", "/api/admin/settings"),
    ("POST", "/api/admin/database/drop"),
    ("GET", "/api/version"),
    ("GET", "/api/docs"),
    ("GET", "/api/variables/name/health"),  # /api/health itself is open
]
PREFECT_SOCKETS = ["events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"]
PREFECT_SOCKETS += ["work_pools/lcmlora/workers/connect"]

MLFLOW_REQUESTS = [
    ("GET", "/"),
    ("GET", "/version"),
    ("GET", "/api/2.0/mlflow/experiments/search?max_results=1"),
    ("POST", "/api/2.0/mlflow/experiments/create"),
    ("GET", "/ajax-api/2.0/mlflow/registered-models/search"),
    ("POST", "/api/2.0/mlflow/registered-models/alias"),
    ("DELETE", "/api/2.0/mlflow/registered-models/delete"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts?path="),
    ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/of-another"),
    ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/1"),
    ("GET", "/get-artifact?path=x&run_uuid=y"),
    ("POST", "/graphql"),
    ("POST", "/v1/traces"),
    ("POST", "/ajax-api/3.0/jobs/search"),
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"),  # it runs commands
    ("POST", "/gateway/x/mlflow/invocations"),
    ("POST", "/api/2.0/mlflow/users/create"),
    ("GET", "/signup"),
    ("GET", "/docs"),
]

S3_REQUESTS = [
    ("GET", "/"),
    ("GET", "/{bucket}"),
    ("PUT", "/{bucket}/of-another"),
    ("DELETE", "/{bucket}/ready"),
    ("DELETE", "/{bucket}"),
]

# By the place of its port in what SeaweedFS is given: master, volume, filer, S3.
GRPC = [
    (1, "master_pb.Seaweed/VolumeList"),
    (1, "master_pb.Seaweed/Assign"),
    (3, "volume_server_pb.VolumeServer/VolumeServerStatus"),
    (5, "filer_pb.SeaweedFiler/ListEntries"),
    (5, "filer_pb.SeaweedFiler/GetFilerConfiguration"),
    (7, "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
]
HTTP = [
    (0, "/dir/assign"),
    (0, "/vol/grow"),
    (0, "/col/delete?collection=x"),
    (2, "/status"),
    (4, "/"),
    (4, "/buckets/"),
]


@dataclass(frozen=True)
class Machine:
    prefect: str
    mlflow: str
    s3: SeaweedFS
    bucket: str


@pytest.fixture(scope="module")
def machine(s3: SeaweedFS, mlflow_server: MLflow, prefect_server: PrefectServer) -> Machine:
    prefect_server.wait()
    return Machine(prefect_server.api.removesuffix("/api"), mlflow_server.uri, s3, mlflow_server.bucket)


def _requests(address: str, known: list[tuple[str, str]], **headers: str) -> list[dict[str, Any]]:
    return [
        {"method": method, "url": address + path, "headers": headers}
        | ({"json": {"job_variables": {"command": "id"}}} if method == "POST" else {})
        for method, path in known
    ]


def test_prefect_and_mlflow_answer_nobody_without_a_password(machine: Machine):
    asked = _requests(machine.prefect, PREFECT_REQUESTS) + _requests(machine.mlflow, MLFLOW_REQUESTS)
    guessed = services.basic_authorization(Login("lcmlora", "guessed"))
    asked += _requests(machine.prefect, PREFECT_REQUESTS[:3], Authorization=guessed)
    asked += _requests(machine.mlflow, MLFLOW_REQUESTS[:3], Authorization=guessed)
    for attempt, found in zip(asked, stranger.attempt(asked), strict=True):
        assert found.get("status") == 401, (attempt, found)
        assert found["origin"] in (None, machine.mlflow), (attempt, found)
    # The owner is answered, and so it is the password that was missing.
    for address, login in ((machine.prefect, PREFECT), (machine.mlflow, MLFLOW)):
        known = PREFECT_REQUESTS[0] if login == PREFECT else MLFLOW_REQUESTS[2]
        (request,) = _requests(address, [known])
        assert httpx.request(**request, auth=(login.name, login.password)).status_code in (200, 422)


@pytest.mark.parametrize("origin", [ELSEWHERE, NEIGHBOUR, "null"])
def test_no_other_page_is_answered_whatever_it_knows(machine: Machine, origin: str):
    for address, login, known in (
        (machine.prefect, PREFECT, [*PREFECT_REQUESTS[:2], ("GET", "/api/health")]),
        (machine.mlflow, MLFLOW, [*MLFLOW_REQUESTS[:3], ("GET", "/health"), ("OPTIONS", MLFLOW_REQUESTS[2][1])]),
    ):
        headers = {
            "Authorization": services.basic_authorization(login),
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
        }
        for request in _requests(address, [*known, ("OPTIONS", known[0][1])], **headers):
            answer = httpx.request(**request)
            assert answer.status_code == 403, request
            assert "access-control-allow-origin" not in answer.headers, request


@pytest.mark.parametrize("host", ["evil.example", "evil.example:4200", "127.0.0.1.evil.example", "192.0.2.1", "", "["])
def test_a_name_that_points_at_this_machine_is_refused(machine: Machine, host: str):
    for address, login in ((machine.prefect, PREFECT), (machine.mlflow, MLFLOW)):
        for path in ("/", "/health", "/api/health"):
            headers = {"Authorization": services.basic_authorization(login), "Host": host}
            assert httpx.get(address + path, headers=headers).status_code in (400, 403), (address, path)


def test_own_pages_are_answered(machine: Machine):
    for address, path, login in (
        (machine.prefect, "/api/version", PREFECT),
        (machine.mlflow, MLFLOW_REQUESTS[2][1], MLFLOW),
    ):
        for page in (address, address.replace("127.0.0.1", "localhost")):
            headers = {"Authorization": services.basic_authorization(login), "Origin": page}
            answer = httpx.get(address + path, headers=headers)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
        headers = {
            "Authorization": services.basic_authorization(login),
            "Host": "localhost:9000",
            "Origin": "http://localhost:9000",
        }
        assert httpx.get(address + path, headers=headers).status_code == 200  # ssh -L 9000:...


def test_prefects_web_sockets_are_closed_before_they_say_anything(machine: Machine):
    asked = [{"websocket": f"{machine.prefect.replace('http', 'ws')}/api/{path}"} for path in PREFECT_SOCKETS]
    for attempt, found in zip(asked, stranger.attempt(asked), strict=True):
        assert "refused" in found, (attempt, found)


def test_a_bucket_takes_signed_requests_alone(machine: Machine):
    known = [(method, path.format(bucket=machine.bucket)) for method, path in S3_REQUESTS]
    asked = _requests(machine.s3.endpoint, known) + _requests(machine.s3.endpoint, known, Origin=ELSEWHERE)
    for attempt, found in zip(asked, stranger.attempt(asked), strict=True):
        assert found.get("status") == 403, (attempt, found)
        # Of what concerns no bucket, SeaweedFS lets every page read that it was refused.
        assert found["origin"] is None or attempt["url"].endswith("/"), (attempt, found)


def test_what_is_behind_the_bucket_talks_to_holders_of_its_certificate_alone(machine: Machine):
    ports, keys = machine.s3.ports, machine.s3.keys_folder
    addresses = [f"127.0.0.1:{ports[place]}{path}" for place, path in HTTP]
    calls = [f"127.0.0.1:{ports[place]}/{name}" for place, name in GRPC]
    asked = [{"url": f"{scheme}://{each}"} for each in addresses for scheme in ("http", "https")]
    asked += [{"url": f"{scheme}://{each}", "method": "POST"} for each in addresses for scheme in ("http", "https")]
    asked += [{"grpc": f"{scheme}://{each}"} for each in calls for scheme in ("http", "https")]
    for attempt, found in zip(asked, stranger.attempt(asked), strict=True):
        plain = found.get("body") == "Client sent an HTTP request to an HTTPS server.\n"
        assert "refused" in found or (found["status"], plain) == (400, True), (attempt, found)
    # With the certificate all of them answer something, and so it is the certificate that was missing.
    context = ssl.create_default_context(cafile=keys / "authority.pem")
    context.load_cert_chain(keys / "certificate.pem", keys / "key.pem")
    for each in addresses[:1] + addresses[3:4]:
        assert "status" in stranger.ask({"url": f"https://{each}"}, context)
    for each in calls:
        assert stranger.ask({"grpc": f"https://{each}"}, context)["status"] == 200


def test_files_sockets_and_processes_are_their_owners(
    machine: Machine, s3: SeaweedFS, mlflow_server: MLflow, prefect_server: PrefectServer
):
    for folder in (s3.keys_folder, mlflow_server.root / "keys"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()} == {0o600}
    sockets = [each for port in s3.ports for each in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]
    assert sockets and all(stat.S_IMODE(each.stat().st_mode) & 0o077 == 0 for each in sockets)
    secrets = [login.password for login in (PREFECT, MLFLOW)] + [secret for _, secret in s3.keys.values()]
    processes = [process for pid in (s3.pid, mlflow_server.pid, prefect_server.pid) for process in _family(pid)]
    words = [word for process in processes for word in process.cmdline()]
    assert not [word for word in words for secret in secrets if secret in word]
    if os.geteuid() != 0:
        pytest.skip("only root can try as another user")
    with tempfile.NamedTemporaryFile(dir="/tmp") as readable:  # what they can do, so that the rest says something
        Path(readable.name).write_text("for all")
        Path(readable.name).chmod(0o644)
        asked = [{"file": readable.name}]
        asked += [{"socket": str(each)} for each in sockets]
        asked += [{"file": f"/proc/{process.pid}/environ"} for process in processes]
        asked += [{"file": str(each)} for each in s3.keys_folder.iterdir()]
        known, *rest = stranger.attempt(asked)
    assert known == {"body": "for all"}
    for attempt, found in zip(asked[1:], rest, strict=True):
        assert "PermissionError" in found.get("refused", ""), (attempt, found)


def _family(pid: int) -> list[psutil.Process]:
    leader = psutil.Process(pid)
    return [leader, *leader.children(recursive=True)]
