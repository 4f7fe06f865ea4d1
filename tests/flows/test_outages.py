"""Runs that go on while Prefect's server is away, or takes them for dead, and slots that stay with the living."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
from prefect import flow
from prefect.client import base
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.concurrency import _leases
from prefect.runtime import flow_run
from prefect.server.concurrency.lease_storage import ConcurrencyLimitLeaseMetadata
from prefect.server.concurrency.lease_storage.filesystem import ConcurrencyLeaseStorage
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE,
    temporary_settings,
)
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running, State

from lcmlora.errors import Unavailable
from lcmlora.flows import provision
from lcmlora.flows.services import POOL, free_ports
from lcmlora.tasks import output, prefect_internals
from lcmlora.tasks.outages import orphans, own_state, slots, temporary_server
from lcmlora.tasks.outages.connection import collecting_requests, connection
from lcmlora.tasks.outages.own_state import Move, move, outlasting
from lcmlora.tasks.outages.slots import Slot, holding_slot
from lcmlora.tasks.prefect_internals import Patience
from lcmlora.tasks.processes import Processes
from tests.flows.conftest import LIMIT
from tests.integration.relay import Relay


@pytest.fixture(autouse=True)
def server(prefect: None) -> Iterator[None]:
    yield


@pytest.fixture
def relay() -> Iterator[Relay]:
    """Stands before the server, for what is asked within the test."""
    port = urlsplit(str(PREFECT_API_URL.value())).port
    assert port is not None
    with Relay(port) as relay, temporary_settings({PREFECT_API_URL: f"{relay.uri}/api"}):
        yield relay


def wait_for(condition: Callable[[], Any]) -> Any:
    until = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def active_slots() -> int:
    with connection() as client:
        return client.read_global_concurrency_limit_by_name(LIMIT).active_slots


# --- what is asked of a server that is away ---------------------------------------------------------------------------


def test_a_client_that_never_reached_the_server_waits_until_it_is_back():
    there = urlsplit(str(PREFECT_API_URL.value())).port
    (port,) = free_ports(1)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}), get_client(sync_client=True) as client:
        with pytest.raises(httpx.ConnectError):
            client.hello()  # Prefect's own way
        assert there is not None
        relays: list[Relay] = []
        back = threading.Timer(0.5, lambda: relays.append(Relay(there, own=port).__enter__()))
        back.start()
        with Patience(60).in_effect():
            assert client.hello().status_code == 200
        relays[0].__exit__(None, None, None)


def test_patience_is_of_the_block_and_a_thread_may_be_without_it():
    before = vars(base) | {}
    with Patience(3600).in_effect():
        assert base.PREFECT_CLIENT_MAX_RETRIES.value() == 720
        assert base.clamped_poisson_interval(2**9, 0.2) < 6
        with prefect_internals.impatient():
            assert base.PREFECT_CLIENT_MAX_RETRIES.value() == 0
        with get_client(sync_client=True) as client:
            assert client.hello().status_code == 200
    assert client._client._has_connected  # a client outlives the block, as that of the log does
    assert {name for name in before if vars(base)[name] is not before[name]} == set()


def test_a_lease_that_cannot_be_renewed_ends_no_run():
    """Prefect's engine keeps the slot of the deployment's limit in this way, and cancels the run otherwise."""
    with connection() as client, Patience(60).in_effect():
        slot = Slot(LIMIT, client)
        assert slot.take()
        renew, over = _leases._renew_concurrency_lease_with_retries, threading.Event()
        assert renew(client, slot.lease, 60.0, over)
        client.release_concurrency_slots_with_lease(slot.lease)
        assert not renew(client, slot.lease, 60.0, over)


# --- slots ------------------------------------------------------------------------------------------------------------


def test_a_slot_that_the_server_has_given_away_is_taken_again(capfd: pytest.CaptureFixture[str]):
    with connection() as client:
        slot = Slot(LIMIT, client)
        assert slot.take() and slot.renew()
        first = slot.lease
        client.release_concurrency_slots_with_lease(first)  # as the server does when a lease has expired
        assert not slot.renew() and active_slots() == 0
        assert slot.renew() and active_slots() == 1
        assert slot.lease not in (None, first)
        slot.give_back()
        assert active_slots() == 0
    said = capfd.readouterr().err
    assert f"given the slot of {LIMIT} away" in said and f"the slot of {LIMIT} was taken again" in said


def test_a_slot_that_another_has_got_meanwhile_is_taken_when_it_is_free():
    with connection() as client:
        slot, other = Slot(LIMIT, client), Slot(LIMIT, client)
        assert slot.take()
        client.release_concurrency_slots_with_lease(slot.lease)
        assert other.take()
        assert not slot.renew() and not slot.renew()
        other.give_back()
        assert slot.renew() and active_slots() == 1
        slot.give_back()


def test_a_slot_is_kept_while_the_server_is_away(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(slots, "_RENEW", 0.1)
    monkeypatch.setattr(slots, "_AGAIN", 0.1)

    def renewals() -> int:
        return sum(request.line.endswith("/renew") for request in relay.requests)

    with Patience(60).in_effect(), Processes() as processes, holding_slot(LIMIT, processes, 60):
        wait_for(lambda: renewals() > 0)
        relay.away, before = True, renewals()
        wait_for(lambda: renewals() > before + 2)
        relay.away, before = False, renewals()
        wait_for(lambda: renewals() > before + 1)
        assert active_slots() == 1
    assert active_slots() == 0


def test_a_server_that_is_away_is_waited_for_with_patience_alone(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(slots, "_AGAIN", 0.1)
    relay.away = True
    with Patience(60).in_effect(), Processes() as processes:
        with pytest.raises(Unavailable, match=f"no slot of the limit '{LIMIT}'"), holding_slot(LIMIT, processes, 0.3):
            raise AssertionError
        threading.Timer(0.5, lambda: setattr(relay, "away", False)).start()
        with holding_slot(LIMIT, processes, 60):
            assert active_slots() == 1
    assert "waiting for Prefect's server, which does not answer" in capfd.readouterr().err


def test_a_slot_that_is_given_back_while_the_server_is_away_is_free_at_the_end_of_the_run(relay: Relay):
    with connection() as client, collecting_requests() as left:
        slot = Slot(LIMIT, client)
        assert slot.take()
        relay.away = True
        with Patience(60).in_effect():
            slot.give_back()
        relay.away = False
        assert active_slots() == 1
        run = client.create_flow_run(flow(lambda: None, name="quiet"), state=Running())
        assert own_state._Watch(run.id, 60, left).look(client)
        assert active_slots() == 0 and left == []


def test_a_server_renews_at_its_start_the_leases_that_nobody_could_renew_while_it_was_away(tmp_path: Path):
    """Without this, it gives slots of living runs away before these find it again."""
    kind = "prefect.server.concurrency.lease_storage.filesystem"
    with temporary_settings({PREFECT_HOME: tmp_path, PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE: kind}):
        leases = ConcurrencyLeaseStorage()

        async def expired() -> list[UUID]:
            return await leases.read_expired_lease_ids()

        made = asyncio.run(leases.create_lease([UUID(int=1)], timedelta(-1), ConcurrencyLimitLeaseMetadata(slots=1)))
        assert asyncio.run(expired()) == [made.id]
        prefect_internals.renew_expired_leases(60)
        assert asyncio.run(expired()) == []
        assert asyncio.run(leases.read_active_lease_ids()) == [made.id]


# --- a run's own state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "cancelling_for", "expected"),
    [
        (Running(), 0.0, Move.NOTHING),
        (None, 0.0, Move.NOTHING),
        (Crashed(), 0.0, Move.REVIVE),
        (Cancelling(), 10.0, Move.NOTHING),  # the worker ends it
        (Cancelling(), 31.0, Move.END),
        (Cancelled(), 0.0, Move.END),
        (Failed(), 0.0, Move.NOTHING),  # a person has set it
    ],
)
def test_a_living_run_puts_its_state_right(state: State[Any], cancelling_for: float, expected: Move):
    assert move(state, cancelling_for) is expected


def test_a_run_that_was_taken_for_dead_runs_again_and_ends_as_it_should(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_state, "_LOOK", 0.1)
    ids: list[UUID] = []

    @flow
    def train() -> State[Any]:
        ids.append(UUID(flow_run.id))
        with outlasting(60), connection() as client:
            for _ in range(2):
                client.set_flow_run_state(ids[0], Crashed(message="Its heartbeats stopped."))
                wait_for(lambda: client.read_flow_run(ids[0]).state.is_running())
            own_state._LOOK = 60.0  # so that the second is found at the run's end
            client.set_flow_run_state(ids[0], Crashed(message="Its heartbeats stopped."))
        return Completed(name="Promoted")

    train(return_state=True)
    with get_client(sync_client=True) as client:
        history = [state.name for state in client.read_flow_run_states(ids[0])]
    assert history == ["Pending", "Running", *["Crashed", "Running"] * 3, "Promoted"]


def test_a_run_says_that_the_server_is_away_and_back(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(own_state._Watch, "_say_alive", lambda watch: None)  # the relay passes no websocket on
    with connection() as client:
        run = client.create_flow_run(flow(lambda: None, name="quiet"), state=Running())
        watch = own_state._Watch(run.id, 60, [])
        with Patience(60).in_effect():
            assert watch.look(client)
            relay.away = True
            assert not watch.look(client) and not watch.look(client)
            threading.Timer(0.3, lambda: setattr(relay, "away", False)).start()
            watch.settle()
        client.delete_flow_run(run.id)
        assert watch.look(client) and watch.look(client)  # nobody asks for it any more
    said = capfd.readouterr().err
    assert [said.count(part) for part in ("does not answer", "is back after", "does not know this run")] == [1, 1, 1]


def test_the_last_progress_of_a_stage_that_ends_while_the_server_is_away_is_shown_when_it_is_back(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(own_state._Watch, "_say_alive", lambda watch: None)  # the relay passes no websocket on
    monkeypatch.setattr(output, "_EVERY", 0.1)
    monkeypatch.setattr(prefect_internals, "_LONGEST_WAIT", 2.0)
    with connection() as client:
        run = client.create_flow_run(flow(lambda: None, name="quiet"), state=Running())
        with Patience(60).in_effect(), collecting_requests() as left:
            relay.away = True
            with output._ProgressArtifact("progress-late", logging.getLogger("late")) as artifact:
                artifact.put("distill a", 7, 8)
                wait_for(lambda: relay.requests)
            threading.Timer(1.0, lambda: setattr(relay, "away", False)).start()
            own_state._Watch(run.id, 60, left).settle()
        asked = {"artifacts": {"key": {"any_": ["progress-late"]}}}
        (found,) = client.request("POST", "/artifacts/filter", json=asked).json()
    assert found["data"] == 87.5


# --- a worker that has died -------------------------------------------------------------------------------------------


def test_output_that_nobody_reads_any_more_fails_no_run(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    monkeypatch.setattr(orphans, "_OUTPUTS", (write,))
    with orphans.keeping_output_open():
        os.write(write, b"heard")
        os.close(read)
        wait_for(lambda: Path(f"/proc/self/fd/{write}").readlink() == Path(os.devnull))
        os.write(write, b"into nothing")
    os.close(write)


@pytest.mark.parametrize(
    ("state", "name", "expected"),
    [
        (Pending(), "rollback", AwaitingRetry),
        (Pending(name="Submitting"), "retrain", AwaitingRetry),
        (Running(), "retrain", AwaitingRetry),
        (Running(), "rollback", Crashed),  # a second one would go back once more
        (Cancelling(), "retrain", Cancelled),
    ],
)
def test_what_a_dead_worker_has_left_goes_on_or_ends(state: State[Any], name: str, expected: Callable[..., State[Any]]):
    becomes = provision.what_becomes_of(state, name)
    assert (becomes.type, becomes.name) == (expected().type, expected().name)


def test_the_runs_of_a_dead_worker_are_taken_up_and_those_of_others_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provision, "_UNNAMED", timedelta(seconds=1))
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        retrain = client.create_flow_from_name("retrain")
        deployed = client.create_deployment(retrain, "scheduled", work_pool_name=POOL)

        def run(state: State[Any], worker: str | None, kind: str = "process") -> UUID:
            made = client.create_flow_run_from_deployment(deployed, state=state)
            if worker:
                client.update_flow_run_labels(made.id, {"prefect.worker.name": worker, "prefect.worker.type": kind})
            return made.id

        dead, waiting, unnamed = run(Running(), "here"), run(Pending(name="Submitting"), "here"), run(Pending(), None)
        alive, elsewhere, contained = run(Running(), "here"), run(Running(), "there"), run(Running(), "here", "docker")
        command = [sys.executable, "-c", "import time; time.sleep(60)", "prefect.engine"]
        process = subprocess.Popen(command, env=os.environ | {"PREFECT__FLOW_RUN_ID": str(alive)})
        wait_for(lambda: provision.is_alive(alive))
        time.sleep(1.1)
        fresh, before = run(Pending(), None), datetime.now(UTC)
        later = run(Running(), "here")
        lines = provision.take_up_runs(POOL, "here", before)
        process.kill()
        process.wait()
        everything = FlowRunFilter(
            id=FlowRunFilterId(any_=[dead, waiting, unnamed, alive, elsewhere, contained, fresh, later])
        )
        names = {run.id: run.state_name for run in client.read_flow_runs(flow_run_filter=everything)}
        assert {names[each] for each in (dead, waiting, unnamed)} == {"AwaitingRetry"}
        assert {names[each] for each in (alive, elsewhere, contained, later)} == {"Running"} and names[
            fresh
        ] == "Pending"
        assert len(lines) == 3
        client.delete_work_pool(POOL)


# --- the temporary server ---------------------------------------------------------------------------------------------


class Mortal:
    """A process with the interface of Prefect's temporary server."""

    def __init__(self, command: str) -> None:
        self.command, self.starts = command, 0
        self.start_again()

    def start_again(self) -> None:
        self.process = subprocess.Popen(["sh", "-c", self.command])
        self.starts += 1

    def status(self) -> int | None:
        return self.process.poll()


def test_a_temporary_server_that_dies_is_started_again_and_one_that_dies_always_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(temporary_server, "_LOOK", 0.05)
    monkeypatch.setattr(base, "PREFECT_CLIENT_MAX_RETRIES", base.PREFECT_CLIENT_MAX_RETRIES)  # put back afterwards
    once = Mortal("exec sleep 60")
    monkeypatch.setattr(prefect_internals, "TemporaryServer", lambda: once)
    with temporary_server.keeping_temporary_server():
        once.process.kill()
        wait_for(lambda: once.starts == 2)
    assert once.status() is None
    once.process.kill()
    once.process.wait()
    assert "was ended by SIGKILL; it is started again, and the run goes on" in capfd.readouterr().err

    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    never = Mortal("exit 3")
    monkeypatch.setattr(prefect_internals, "TemporaryServer", lambda: never)
    with temporary_server.keeping_temporary_server():
        wait_for(lambda: ended)
    signal.signal(signal.SIGTERM, before)
    assert never.starts == 4
    assert "ended with status 3 again, so the run is ended" in capfd.readouterr().err
