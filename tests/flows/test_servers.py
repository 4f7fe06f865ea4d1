"""What keeps the servers of one `up` apart from others: ports, proof of who listens, logs, variables of the shell."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows import background, services, stack
from lcmlora.flows.servers import definitions, environment, logs, ports
from lcmlora.flows.servers.ports import HOST, Chooser, Taken
from lcmlora.flows.servers.worker import Variables
from lcmlora.flows.services import Service
from lcmlora.flows.stack import State

ROOT = Path(__file__).parents[2]

SERVER = [sys.executable, "-m", "http.server", "--bind", HOST]

HOLD = """
import sys
from pathlib import Path
from lcmlora.flows.servers.ports import Chooser
with Chooser(Path(sys.argv[1])) as chooser:
    print(chooser.take(int(sys.argv[2])), chooser.free(1)[0], flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder .up/ of a project; what was started for it ends with the test."""
    up = tmp_path / "project/.up"
    up.mkdir(parents=True)
    yield up
    background.end(*(up / name for name in ("mlflow", "prefect")))


def inherited(name: str) -> dict[str, str]:
    return dict(os.environ)


def server(name: str, port: int) -> Service:
    return Service(name, [*SERVER, str(port)], {}, lambda: services.is_healthy(f"http://{HOST}:{port}"), ports=(port,))


def test_two_who_choose_at_once_choose_different_ports(tmp_path: Path):
    file, (wanted,) = tmp_path / "ports", ports.free_ports(1)
    command = [sys.executable, "-c", HOLD, str(file), str(wanted)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin and other.stdout
        took, also = other.stdout.readline().split()
        assert took == "True"
        with Chooser(file) as chooser:
            assert ports.is_free(wanted) and not chooser.take(wanted)
            assert not chooser.take(int(also))
            assert not {wanted, int(also)} & set(chooser.free(20))
            other.stdin.close()
            other.wait()
            assert chooser.take(wanted)


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, HOST), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::")]
)
def test_a_port_that_somebody_has_at_either_name_of_this_machine_is_not_free(family: socket.AddressFamily, host: str):
    with socket.socket(family) as other:
        try:
            other.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        other.listen()
        assert not ports.is_free(other.getsockname()[1])


class _Curious(http.server.BaseHTTPRequestHandler):
    """Answers everything, and keeps what it was told."""

    told: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.told.append(str(self.headers))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


def test_another_who_answers_at_the_port_is_not_taken_for_the_server_and_told_nothing(folder: Path):
    with http.server.HTTPServer((HOST, 0), _Curious) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        port = foreign.server_address[1]
        login = services.Login("lcmlora", "a-password")
        real = services.prefect(port, folder / "prefect", login)
        late = Service("prefect", [sys.executable, "-c", "import time; time.sleep(60)"], {}, real.answers, real.ports)
        started: dict[str, background.StartedProcess] = {}
        background.start([late], folder, started, inherited)
        with pytest.raises(Taken):
            background.wait([late], folder, started)
        foreign.shutdown()
    assert _Curious.told == []


def test_a_server_that_lost_its_port_says_so_although_the_port_is_free_again(folder: Path):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        service = server("mlflow", other.getsockname()[1])
        started: dict[str, background.StartedProcess] = {}
        background.start([service], folder, started, inherited)
        _until(lambda: not background.family(folder / "mlflow"))
    with pytest.raises(Taken):
        background.wait([service], folder, started)
    # Of what an earlier start has left in the log nothing is said.
    failing = Service("mlflow", [sys.executable, "-c", "raise SystemExit('no such table')"], {}, lambda: False)
    background.start([failing], folder, started, inherited)
    with pytest.raises(UserError, match="no such table"):
        background.wait([failing], folder, started)


def test_a_port_that_is_taken_between_choosing_and_starting_is_chosen_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    project = folder.parent
    for name in ("params.yaml", "prefect.yaml"):
        shutil.copy(ROOT / name, project)
    monkeypatch.chdir(project)
    monkeypatch.setattr(services, "weed", lambda: None)
    monkeypatch.setattr(services, "mlflow", lambda port, *rest: server("mlflow", port))
    monkeypatch.setattr(services, "prefect", lambda port, *rest: server("prefect", port))
    begin, foreign = background.start, socket.socket()

    def start(found: list[Service], *rest: object) -> list[Service]:
        with contextlib.suppress(OSError):  # the second time it has one
            foreign.bind((HOST, found[0].ports[0]))
            foreign.listen()
        return begin(found, *rest)

    monkeypatch.setattr(background, "start", start)
    state = State()
    with foreign:
        plan = stack._servers(project, folder, config.load(), state)
        taken = foreign.getsockname()[1]
        assert state.ports["mlflow"] != [taken]
        assert plan.exported["MLFLOW_TRACKING_URI"] == f"http://{HOST}:{state.ports['mlflow'][0]}"
        assert ports.listening([state.started["mlflow"].pid]) == set(state.ports["mlflow"])
        assert json.loads((folder / "state.json").read_text())["ports"] == state.ports


def test_servers_are_found_in_a_renamed_project_and_not_in_a_copy(folder: Path):
    service = server("prefect", ports.free_ports(1)[0])
    background.start([service], folder, {}, inherited)
    renamed, copy = (folder.parents[1] / name / ".up" for name in ("renamed", "copy"))
    shutil.copytree(folder.parent, copy.parent)
    assert background.family(copy / "prefect") == []
    folder.parent.rename(renamed.parent)
    assert background.family(copy / "prefect") == []
    assert background.end(renamed / "prefect") == 1


def test_settings_of_seaweedfs_follow_a_project_that_was_renamed_or_restored_elsewhere(tmp_path: Path):
    identities = {"lcmlora": services.Identity("a", "b", services.OWNER)}
    services.write_keys(tmp_path / "keys", identities)
    first = (tmp_path / "keys/security.toml").read_text()
    services.write_keys(tmp_path / "keys", identities)
    assert (tmp_path / "keys/security.toml").read_text() == first
    (tmp_path / "keys").rename(tmp_path / "renamed")
    services.write_keys(tmp_path / "renamed", identities)
    now = (tmp_path / "renamed/security.toml").read_text()
    assert str(tmp_path / "keys") not in now and str(tmp_path / "renamed/authority.pem") in now


WRITER = """
import sys, threading, time
from pathlib import Path
from lcmlora.flows.servers import logs
def follow():
    while True:
        logs.follow(Path(sys.argv[1]), (1, 2), 40_000)
threading.Thread(target=follow, daemon=True).start()
for number in range(15_000):
    print(f"line {number}", flush=True)
    if number % 500 == 0:
        time.sleep(0.01)
"""


def test_a_log_that_grows_is_moved_aside_and_no_line_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "KEPT", 9)
    log = tmp_path / "prefect.log"
    source = WRITER.replace("def follow", "logs.KEPT = 9\ndef follow")
    with log.open("ab") as output:
        subprocess.run([sys.executable, "-c", source, str(log)], stdout=output, check=True)
    kept = [*reversed([path for path in logs._numbered(log) if path.exists()]), log]
    assert 2 <= len(kept) <= 10
    # Unbuffered, Python writes a line and its end one after the other: a move may fall between the two.
    assert "".join(path.read_text() for path in kept) == "".join(f"line {n}\n" for n in range(15_000))
    assert logs.tail(log, 1) == "line 14999"


def test_former_logs_are_dropped_and_a_deleted_log_is_begun_again(tmp_path: Path):
    log = tmp_path / "worker.log"
    with log.open("ab") as output:
        for number in range(2 * logs.KEPT):
            os.write(output.fileno(), f"{number}".encode() * 10)
            logs.follow(log, (output.fileno(),), limit=5)
        log.unlink(missing_ok=True)
        logs.follow(log, (output.fileno(),), limit=5)
        os.write(output.fileno(), b"new")
    assert log.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker.log", *(f"worker.log.{n}" for n in (1, 2, 3))]
    assert (tmp_path / "worker.log.1").read_text() == f"{2 * logs.KEPT - 1}" * 10


def test_keys_of_the_shell_reach_runs_whole_and_stay_where_a_crontab_has_none():
    first = environment.given(
        {"AWS_ACCESS_KEY_ID": "a", "AWS_SESSION_TOKEN": "t", "HF_TOKEN": "h", "X": "x"}, {}, False
    )
    assert first == {"AWS_ACCESS_KEY_ID": "a", "AWS_SESSION_TOKEN": "t", "HF_TOKEN": "h"}
    assert environment.given({"PATH": "/bin"}, first, False) == first
    rotated = environment.given({"AWS_ACCESS_KEY_ID": "b"}, first, False)
    assert rotated == {"AWS_ACCESS_KEY_ID": "b", "HF_TOKEN": "h"}  # not with the token of the former keys
    assert environment.given({"AWS_ACCESS_KEY_ID": "b"}, first, True) == {"HF_TOKEN": "h"}
    named = environment.named("targets: {team: {kind: slack, address: 'env:TEAM_URL'}}")
    assert environment.given({"TEAM_URL": "https://x"}, {}, False, named) == {"TEAM_URL": "https://x"}
    assert environment.given({}, {"TEAM_URL": "https://x"}, False, named) == {"TEAM_URL": "https://x"}


def test_a_worker_takes_variables_that_are_new_and_drops_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "former")
    file = tmp_path / "variables.json"
    file.write_text(environment.as_json({"AWS_ACCESS_KEY_ID": "a", "AWS_SESSION_TOKEN": "t"}))
    variables = Variables(file)
    variables.refresh()
    assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SESSION_TOKEN"]) == ("a", "t")
    services.credentials.write_secret(file, environment.as_json({"AWS_ACCESS_KEY_ID": "b"}))
    variables.refresh()
    assert os.environ.pop("AWS_ACCESS_KEY_ID") == "b"
    assert "AWS_SESSION_TOKEN" not in os.environ


def test_rotated_keys_change_what_mlflow_is_started_with_and_not_the_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    project = folder.parent
    shutil.copy(ROOT / "prefect.yaml", project)
    text = (ROOT / "params.yaml").read_text()
    (project / "params.yaml").write_text(text + "\npublish: {to: s3://models/lcm}\n")
    monkeypatch.chdir(project)
    state = State()
    plans = []
    for key in ("first", "second"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        with Chooser() as chooser:
            plans.append(stack._plan(project, folder, config.load(), state, chooser))
    assert [plan.servers[0].environment["AWS_ACCESS_KEY_ID"] for plan in plans] == ["first", "second"]
    assert plans[0].servers[1].environment == plans[1].servers[1].environment
    assert plans[0].exported == plans[1].exported
    assert plans[1].given["AWS_ACCESS_KEY_ID"] == "second"


def test_a_shell_that_knows_the_servers_of_another_project_does_not_lead_there(tmp_path: Path):
    mine, theirs = tmp_path / "mine/.up", tmp_path / "theirs/.up"
    theirs.mkdir(parents=True)
    exported = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000", "LCMLORA_PUBLISH_TO": "s3://lcmlora/releases"}
    exported |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:8333", "AWS_ACCESS_KEY_ID": "theirs"}
    (theirs / "state.json").write_text(json.dumps({"exported": exported}))
    shell = exported | {environment.FOLDER: str(theirs), "HF_TOKEN": "h"}
    assert environment.forget_sourced(shell, mine, {}) == str(theirs)
    assert shell == {"HF_TOKEN": "h"}
    # Their servers, or one's own, have other ports since.
    for folder in (theirs, mine):
        (theirs / "state.json").unlink(missing_ok=True)
        shell = exported | {environment.FOLDER: str(folder), "HF_TOKEN": "h"}
        assert environment.forget_sourced(shell, mine, {}) == (str(theirs) if folder == theirs else None)
        assert shell == {"HF_TOKEN": "h"}
    own = {"MLFLOW_TRACKING_URI": "https://mlflow.example.org", environment.FOLDER: str(mine)}
    assert environment.forget_sourced(own, mine, {}) is None
    assert own == {"MLFLOW_TRACKING_URI": "https://mlflow.example.org"}  # set beside it


def test_a_damaged_state_is_told_in_one_line(folder: Path):
    (folder / "state.json").write_text('{"ports": {"mlflow"')
    with pytest.raises(UserError, match=r"state\.json: .*bring it back from a backup, or move it away"):
        stack.read_state(folder)


def test_all_deployments_have_one_pool(tmp_path: Path):
    path = tmp_path / "prefect.yaml"
    path.write_text("deployments: [{work_pool: {name: a}}, {work_pool: {name: a}}]")
    assert definitions.work_pool(path) == "a"
    path.write_text("deployments: [{work_pool: {name: a}}, {work_pool: {name: b}}, {}]")
    with pytest.raises(UserError, match="expected one pool for all deployments, and there are: None, a, b"):
        definitions.work_pool(path)


def _until(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)
