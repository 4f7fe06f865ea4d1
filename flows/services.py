"""The servers that flows work with, as commands. `lcmlora up` starts them, and so do the tests."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from lcmlora.errors import UserError
from lcmlora.flows import credentials
from lcmlora.flows.credentials import Login
from lcmlora.flows.servers import logs
from lcmlora.flows.servers.ports import HOST, free_ports, is_free
from lcmlora.io.parsing import MAX_BYTES, Malformed, parse_json

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["HOST", "free_ports", "is_free"]

REGION = "us-east-1"  # SeaweedFS has no other
POOL = "lcmlora"  # Prefect's work pool, which prefect.yaml names

# Turns telemetry off.
NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


@dataclass(frozen=True)
class Service:
    """A server: the command that starts it, and the test that it works.

    answers: is asked only when the server's own processes listen on all of its ports, since it tells them a password.
    ports: of this machine, on which it listens.
    """

    name: str
    command: list[str]
    environment: dict[str, str]  # beside what it inherits; secrets are here, and not on the command line
    answers: Callable[[], bool]
    ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Identity:
    """The keys of an S3 user, and the user's rights, such as `Read` or `Write:bucket/prefix/*`."""

    access: str
    secret: str
    actions: tuple[str, ...]


OWNER = ("Admin", "Read", "Write", "List")


@dataclass(frozen=True)
class S3:
    """The address of an S3 server, and the keys to it."""

    endpoint: str
    access: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which boto3 finds it, which DVC, MLflow and the stores of releases use."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
        }

    def client(self, *, patient: bool = False) -> S3Client:
        """Returns a client; not a patient one has no retries, as waiting for a server calls it often enough."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
            config=Config(
                connect_timeout=2,
                read_timeout=120 if patient else 10,
                retries={"total_max_attempts": 5 if patient else 1, "mode": "standard"},
            ),
        )


def seaweedfs(
    folder: Path,
    ports: Sequence[int],
    s3: S3,
    keys: Path,
    key: str,
    bucket: str = "ready",
    volume_mb: int = 64,
    log_folder: Path | None = None,
) -> Service:
    """Returns SeaweedFS as an S3 server of one process: `weed server` with a filer.

    S3 accepts signed requests only. The servers behind it, on HTTP and gRPC, accept only clients with its certificate.

    Args:
        folder: for its data.
        ports: eight ports; the seventh is that of S3, which `s3` names.
        s3: the keys of an identity with all rights.
        keys: the folder that `write_keys` wrote.
        key: a passphrase for encrypted objects.
        bucket: is made before the service counts as answering.
        volume_mb: size of the files that keep the objects; each bucket has several.
        log_folder: for its log, of which it keeps the newest files; None for the standard error.
    """
    flags = {
        "dir": folder,
        "ip": HOST,
        "ip.bind": HOST,
        "master.port": ports[0],
        "master.port.grpc": ports[1],
        "volume.port": ports[2],
        "volume.port.grpc": ports[3],
        "filer.port": ports[4],
        "filer.port.grpc": ports[5],
        "filer.allowedOrigins": s3.endpoint,  # the default is all
        "s3.port": ports[6],
        "s3.port.grpc": ports[7],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": keys / "identities.json",
        "s3.iam": "false",  # no requests that make users
        "s3.allowedOrigins": s3.endpoint,
        "master.volumeSizeLimitMB": volume_mb,
        "volume.max": 0,
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "volume.preStopSeconds": 0,
    }
    # By default its log is a file in the shared temporary folder.
    to = ["-logtostderr=true"]
    if log_folder:
        to = [f"-logdir={log_folder}", f"-log_max_size_mb={logs.MEGABYTES}", f"-log_max_files={logs.KEPT}"]
        to += ["-stderrthreshold=3"]  # what ends it, and no more
    command = [str(weed()), f"-config_dir={keys}", *to, "server", "-filer", "-s3"]
    command += [f"-{name}={value}" for name, value in flags.items()]
    return Service("seaweedfs", command, {"WEED_S3_SSE_KEY": key}, lambda: _stores(s3, bucket), tuple(ports))


def write_keys(folder: Path, identities: Mapping[str, Identity]) -> None:
    """Writes SeaweedFS's settings, for nobody else to read: the users of S3, and certificates for its own parts."""
    folder.mkdir(mode=0o700, exist_ok=True)
    users = [
        {"name": name, "credentials": [{"accessKey": i.access, "secretKey": i.secret}], "actions": list(i.actions)}
        for name, i in identities.items()
    ]
    credentials.write_secret(folder / "identities.json", json.dumps({"identities": users}))
    made = credentials.certificate(folder, HOST)
    settings = folder / "security.toml"
    if settings.exists() and json.dumps(str(made.key)) in settings.read_text():  # else the project was moved
        return
    own = {"cert": made.certificate, "key": made.key}
    sections: dict[str, Mapping[str, object]] = {"grpc": {"ca": made.authority}}
    sections |= {f"grpc.{part}": own for part in ("master", "volume", "filer", "s3", "client")}
    sections |= {f"https.{part}": own | {"ca": made.authority} for part in ("master", "volume", "filer", "client")}
    sections["https.client"] = {**sections["https.client"], "enabled": True}
    for signed in ("signing", "signing.read", "filer_signing", "filer_signing.read"):
        sections[f"jwt.{signed}"] = {"key": secrets.token_hex(32)}
    lines = []
    for title, values in sections.items():
        lines += [f"[{title}]"]
        # JSON's strings and booleans are TOML's.
        lines += [f"{name} = {json.dumps(v if v is True else str(v))}" for name, v in values.items()]
    credentials.write_secret(settings, "\n".join(lines) + "\n")


def weed() -> str | None:
    """Returns the path of SeaweedFS's program, first that beside this interpreter; None where there is none."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")


def mlflow(port: int, database: str, artifacts: str, access: Mapping[str, str], login: Login, keys: Path) -> Service:
    """Returns an MLflow tracking server. It passes artifacts on, so that clients need no keys to their store.

    Args:
        database: an SQLAlchemy address. It is given in the environment, since it may contain a password.
        artifacts: a folder or s3://bucket/prefix.
        access: the environment variables with the keys to it.
        login: of the administrator, its only user; used if `keys` has no users yet.
        keys: a folder that nobody else can read, for its users.
    """
    keys.mkdir(mode=0o700, exist_ok=True)
    lines = ["[mlflow]", "default_permission = NO_PERMISSIONS", f"database_uri = sqlite:///{users_of(keys)}"]
    # Checking a password takes a tenth of a second at each request, unless the result is kept.
    lines += ["auth_cache_ttl_seconds = 300"]
    credentials.write_secret(keys / "mlflow.ini", "\n".join(lines) + "\n")
    arguments = ["--app-name", "lcmlora", "--host", HOST, "--port", str(port), "--workers", "1"]
    return Service(
        "mlflow",
        module("mlflow", "server", *arguments),
        {
            **access,
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would start eight more processes
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": _pages(port),
            "MLFLOW_AUTH_CONFIG_PATH": str(keys / "mlflow.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": login.name,
            "MLFLOW_AUTH_ADMIN_PASSWORD": login.password,
            "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",  # refuses requests without a rule
            "MLFLOW_FLASK_SERVER_SECRET_KEY": hashlib.sha256(f"session {login.password}".encode()).hexdigest(),
        },
        lambda: _admits(f"http://{HOST}:{port}/api/2.0/mlflow/users/get?username={login.name}", login, "mlflow"),
        (port,),
    )


def users_of(keys: Path) -> Path:
    """Returns the database of MLflow's users."""
    return keys / "users.db"


def prefect(port: int, home: Path, login: Login, pages: bool = True) -> Service:
    """Returns a Prefect server with an sqlite database below `home`."""
    api = f"http://{HOST}:{port}/api"
    command = module("uvicorn", "--factory", "lcmlora.flows.access_guard:prefect", "--host", HOST, "--port", str(port))
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_AUTH_STRING": login.pair,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": _pages(port),
        "PREFECT_SERVER_UI_ENABLED": str(pages).lower(),
        "PREFECT_UI_API_URL": api,
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # By default leases are kept in memory: after a restart, nobody would give a slot back.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # `watch` alone runs 35,000 times a year; Prefect deletes runs after 90 days.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    }
    command += ["--log-level", "warning"]
    return Service("prefect", command, environment, lambda: _admits(f"{api}/version", login, "prefect"), (port,))


def _pages(port: int) -> str:
    """Returns the origins of a server's own pages, which people open by either name of this machine."""
    return f"http://{HOST}:{port},http://localhost:{port}"


def worker(api: str, login: Login, home: Path, project: Path, name: str, pool: str, variables: Path) -> Service:
    """Returns a worker that runs this project's flows as processes, and logs its lines and theirs as JSON.

    If it is killed, its runs go on.

    It counts as answering after its first heartbeat since this call.

    Args:
        pool: the work pool whose runs it takes.
        variables: the file with the environment variables of its runs, which may change while it works.
    """
    began = datetime.now(UTC)
    command = module("lcmlora.flows.servers.worker", str(variables))
    command += ["worker", "start", "--pool", pool, "--type", "process", "--name", name]
    environment = {
        "PREFECT_API_URL": api,
        "PREFECT_API_AUTH_STRING": login.pair,
        "PREFECT_HOME": str(home),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "LCMLORA_PROJECT": str(project),
    }
    return Service("worker", command, environment, lambda: _is_online(api, login, pool, name, began))


def is_healthy(address: str) -> bool:
    """Returns whether an HTTP GET is answered with 200."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _admits(address: str, login: Login, server: str) -> bool:
    """Returns whether the server works and knows the login. Raises UserError if it refuses the login."""
    request = urllib.request.Request(address, headers={"Authorization": basic_authorization(login)})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"{server}: refuses the password in .up/state.json, which is not the one that it was first started "
                "with; bring that file back from a backup"
            ) from None
        return False
    except OSError:
        return False


def module(name: str, *arguments: str) -> list[str]:
    """Returns `python -P -m NAME ARGUMENTS` with this interpreter: the current folder is not searched for modules."""
    return [sys.executable, "-P", "-m", name, *arguments]


def _stores(s3: S3, bucket: str) -> bool:
    """Returns whether an object can be written: the S3 gateway answers well before its volumes do."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = s3.client()
    try:
        if all(each["Name"] != bucket for each in client.list_buckets()["Buckets"]):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="ready", Body=b"ready")
    except (BotoCoreError, ClientError):
        return False
    return True


def _is_online(api: str, login: Login, pool: str, name: str, began: datetime) -> bool:
    headers = {"Content-Type": "application/json", "Authorization": basic_authorization(login)}
    request = urllib.request.Request(f"{api}/work_pools/{quote(pool, safe='')}/workers/filter", b"{}", headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            workers = parse_json(answer.read(MAX_BYTES))
        return any(
            each["name"] == name and datetime.fromisoformat(each["last_heartbeat_time"]) > began for each in workers
        )
    except (OSError, Malformed, KeyError, TypeError, ValueError):  # no answer, or the answer of another server
        return False


def basic_authorization(login: Login) -> str:
    """Returns the value of a request's header `Authorization`."""
    return f"Basic {base64.b64encode(login.pair.encode()).decode()}"
