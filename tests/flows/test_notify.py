"""What people are told and how often: through failures of the receiver, kills of the sender, and nights of the same."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Crashed, Scheduled

from lcmlora import config
from lcmlora.cli.context import Context
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows import memory, notify, verbs
from lcmlora.flows.memory import Memory
from lcmlora.flows.notices import delivery, history, outbox, repeats, rounds, troubles
from lcmlora.flows.notices.event import Event
from lcmlora.registry import events, promotion
from lcmlora.registry.approval import decisions
from lcmlora.registry.listing import recent
from tests.flows.conftest import Project
from tests.flows.test_watch import Killed, killing_at
from tests.support.receivers import Receiver, receiver
from tests.support.releases import write_sealed

NOW = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(delivery, "_PAUSE", 60)  # no second try within a call
    with receiver() as found:
        monkeypatch.setenv("HOOK", found.address)
        yield found


@pytest.fixture
def told(project: Project, web: Receiver) -> Config:
    """Settings of a project of its own whose team is told of everything, and whose dog only of a's trouble."""
    targets = {
        "team": {"kind": "webhook", "address": "env:HOOK"},
        "dog": {"kind": "webhook", "address": "env:UNSET", "events": ["failed"], "models": ["a"]},
    }
    project.change(lambda raw: raw.update(notify={"targets": targets, "disk_gb": 0}))
    project.change(lambda raw: raw["registry"].update(experiment=project.root.parent.name))
    return config.load()


def reasons(web: Receiver) -> list[tuple[str, int]]:
    return [(document["reason"], document["times"]) for document in web.documents]


def test_the_same_trouble_is_told_once_and_counted_until_it_is_over(
    told: Config, web: Receiver, monkeypatch: pytest.MonkeyPatch
):
    def night(number: int, reason: str, run: str | None = None) -> None:
        monkeypatch.setattr(repeats, "_now", lambda: f"2026-11-{number:02}T02:00:00+00:00")
        notify.send(Event("failed", reason, model="b", run=run or f"run {number}"), told)

    for number in (1, 2, 3):
        night(number, f"step {number}: the loss is not finite")
    night(3, "step 3: the loss is not finite")  # the watch looks at a run that has told it itself
    night(4, "no space left")
    assert reasons(web) == [("step 1: the loss is not finite", 1), ("no space left", 1)]
    night(8, "step 8: the loss is not finite")  # a week after the first
    assert reasons(web)[2:] == [("step 8: the loss is not finite", 4)]
    assert web.documents[-1]["since"] == "2026-11-01T02:00:00Z"
    notify.settle("b", told, "failed")
    night(9, "step 9: the loss is not finite")
    assert reasons(web)[3:] == [("step 9: the loss is not finite", 1)]
    every_time = told.model_copy(update={"notify": told.notify.model_copy(update={"repeat_days": 0})})
    notify.send(Event("failed", "step 9: the loss is not finite", model="b"), every_time)
    assert reasons(web)[4:] == [("step 9: the loss is not finite", 2)]


def test_a_message_is_never_lost_and_comes_twice_at_most_with_one_id(
    told: Config, web: Receiver, monkeypatch: pytest.MonkeyPatch
):
    # The moments: nothing is kept yet; kept, not sent; sent, not forgotten.
    for number, (owner, name, sent) in enumerate(
        ((outbox, "put", 0), (repeats.Count, "keep", 0), (outbox, "send", 0), (outbox, "take", 1))
    ):
        event = Event("stuck", "abcd"[number], run=str(number))
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing_at(patch, owner, name)
            notify.send(event, told)
        assert len(web.requests) == sent
        notify.send(event, told)  # what noticed it notices it again
        assert notify.resend(told) == (number > 0)
        assert {reason for reason, _ in reasons(web)} == {"abcd"[number]} and len(web.requests) <= 2
        if name == "take":
            assert len({document["id"] for document in web.documents}) == 1
        web.requests.clear()
    assert Memory(outbox.SUBJECT, told).read() == {}


def test_what_a_receiver_does_not_take_is_told_in_the_log_and_tried_again_for_three_days(
    told: Config, web: Receiver, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    web.answers += [(500, {})] * 2
    notify.send(Event("failed", "one", model="a"), told)
    notify.send(Event("failed", "two", model="b"), told)
    log = capsys.readouterr().err
    assert log.count("warning: notify.targets.team: answers 500; `watch` tries again for 3 days") == 2
    assert "warning: notify.targets.dog: the environment variable UNSET is not set" in log
    web.answers.append((503, {}))
    assert notify.resend(told) == 0 and len(web.requests) == 3  # one that is down is not asked for every message
    assert notify.resend(told) == 2
    assert [document["reason"] for document in web.documents[-2:]] == ["one", "two"]
    entries = Memory(outbox.SUBJECT, told).read()
    ((key, entry),) = entries.items()
    assert entry["target"] == "dog"
    entry["message"]["time"] = "2026-11-01T00:00:00Z"
    Memory(outbox.SUBJECT, told).write(key, entry)
    assert notify.resend(told) == 0
    assert "notify.targets.dog: lcmlora: a failed: given up after 3 days" in capsys.readouterr().err
    assert Memory(outbox.SUBJECT, told).read() == {}


def test_what_happens_to_versions_is_told_once_whoever_does_it(
    told: Config, web: Receiver, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lcmlora.registry.registration import register_release

    def add(weights: str, *failures: str) -> Any:
        folder = write_sealed(tmp_path / weights, weights=weights.encode())
        return register_release("a", told.registry, folder, f"file:///{weights}", failures)

    add("one", "excess 9 is above 8")
    rounds.tell_history(["a"], told)
    second = add("two")
    promotion.promote_passed(second, told.registry, reason="passed the gate", who="ada")
    third = add("three")
    decisions.request(third.name, third.version, told.registry, reason="passed the gate")
    decisions.reject("a/3", told.registry, reason="blurred hands", who="bob")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing_at(patch, Memory, "write", 3)  # the second event was sent, and it was not kept that it was
        rounds.tell_history(["a"], told)
    for _ in range(2):
        rounds.tell_history(["a"], told)
    found = {document["id"]: document for document in web.documents}
    assert len(web.documents) <= len(found) + 1
    assert [(each["kind"], each["version"]) for each in found.values()] == [
        ("rejected", "lcm-lora-a/1"),
        ("promoted", "lcm-lora-a/2"),
        ("approval_needed", "lcm-lora-a/3"),
        ("rejected", "lcm-lora-a/3"),
    ]
    rejected, promoted, needed, refused = found.values()
    assert rejected["reason"] == "lcm-lora-a/1: rejected: excess 9 is above 8"
    assert promoted["reason"] == "lcm-lora-a/2 is champion now, promoted by ada: passed the gate"
    assert "`lcmlora approve lcm-lora-a/3`" in needed["reason"]
    assert refused["reason"] == "lcm-lora-a/3: approval rejected by bob: blurred hands"
    assert needed["links"]["release"] == "file:///three"
    assert {"excess at 4 steps", "excess at 4 steps of lcm-lora-a/2, the champion"} <= needed["figures"].keys()


def test_a_look_at_all_models_reads_what_happened_since_the_last_one_and_what_a_slow_clock_brings_late(
    told: Config, web: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lcmlora.registry.registration import register_release

    noon = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=70)

    def add(model: str, weights: str, minutes: int) -> None:
        """Registers a version that the gate turns down, as a machine does whose clock says so many minutes past."""
        time = noon + datetime.timedelta(minutes=minutes)
        monkeypatch.setattr(events, "now", lambda: time.isoformat(timespec="microseconds").replace("+00:00", "Z"))
        folder = write_sealed(tmp_path / weights, weights=weights.encode(), model=model)
        register_release(model, told.registry, folder, f"file:///{weights}", ["blurred"])

    def look(minutes: int) -> list[str]:
        web.requests.clear()
        monkeypatch.setattr(history, "_now", lambda: noon + datetime.timedelta(minutes=minutes))
        rounds.tell_history(told.models, told)
        return [document["version"] for document in web.documents]

    asked = list[datetime.datetime]()
    read = recent.read
    monkeypatch.setattr(recent, "read", lambda *given: (asked.append(given[-1]), read(*given))[1])
    add("a", "one", 0)
    assert look(1) == ["lcm-lora-a/1"]
    assert web.documents[0]["since"] == noon.isoformat(timespec="seconds").replace("+00:00", "Z")
    assert look(16) == []
    add("b", "two", -30)  # b has no entry of its own yet
    assert look(31) == ["lcm-lora-b/1"] and look(46) == []
    add("a", "three", -10)
    assert look(61) == ["lcm-lora-a/2"] and look(70) == []
    assert asked[-1] == noon + datetime.timedelta(minutes=1)  # the last look, and the hour by which clocks may differ


@pytest.mark.parametrize(
    ("kind", "minutes", "line", "expected"),
    [
        (StateType.SCHEDULED, 59, None, None),
        (StateType.SCHEDULED, 61, None, "should have started at 2026-11-29 10:59 UTC"),
        (StateType.PENDING, 61, None, "waits for its process since"),
        (StateType.CANCELLING, 61, None, "is being cancelled since"),
        (StateType.RUNNING, 239, None, None),
        (StateType.RUNNING, 241, 10, None),
        (StateType.RUNNING, 500, 241, "has said nothing since 2026-11-29 07:59 UTC"),
        (StateType.RUNNING, 241, None, "has said nothing since 2026-11-29 07:59 UTC"),
        (StateType.COMPLETED, 999, None, None),
    ],
)
def test_a_run_is_stuck_if_it_is_late_pending_or_silent_for_long(
    kind: StateType, minutes: int, line: int | None, expected: str | None
):
    since = NOW - datetime.timedelta(minutes=minutes)
    run = FlowRun(flow_id="00000000-0000-0000-0000-000000000000", expected_start_time=since)  # type: ignore[arg-type]
    run.state = State(type=kind, timestamp=since)
    last = None if line is None else NOW - datetime.timedelta(minutes=line)
    settings = Config.model_construct(notify=config.Notify())
    reason = troubles._why_stuck(run, settings, NOW, lambda: last)
    assert reason is None if expected is None else expected in str(reason)


def test_a_disk_with_little_space_is_told_once_and_again_when_it_was_free_in_between(
    told: Config, web: Receiver, project: Project
):
    full = told.model_copy(update={"notify": told.notify.model_copy(update={"disk_gb": 1e9})})
    for settings in (full, full, told, full):
        rounds.quarter_hourly(settings)
    assert [document["kind"] for document in web.documents] == ["disk"] * 2
    assert "less than the 1e+09 GB of notify.disk_gb" in web.documents[0]["reason"]


def test_runs_that_are_late_or_crashed_are_told_once_and_those_of_other_projects_are_not(
    told: Config, web: Receiver, project: Project
):
    def run(deployment: Any, state: State) -> None:
        client.create_flow_run_from_deployment(deployment, state=state)

    now = datetime.datetime.now(datetime.UTC)
    late = now - datetime.timedelta(hours=2)
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("retrain")
        ours = client.create_deployment(flow, name=memory.project())
        others = client.create_deployment(flow, name="another")
        for deployment in (ours, others):
            run(deployment, Scheduled(scheduled_time=late))
            run(deployment, Scheduled(scheduled_time=now + datetime.timedelta(hours=2)))
            run(deployment, Crashed(message="killed by the system, token=abcdef"))
    for _ in range(2):
        rounds.quarter_hourly(told)
    assert sorted((document["kind"], document["times"]) for document in web.documents) == [("failed", 1), ("stuck", 1)]
    crashed, stuck = sorted(web.documents, key=lambda document: str(document["kind"]))
    assert crashed["reason"] == "a run of retrain ended as Crashed: killed by the system, token=***"
    assert stuck["reason"].startswith(f"a run of retrain should have started at {late:%Y-%m-%d %H:%M} UTC: is a worker")
    assert stuck["links"]["Prefect run"].endswith(f"/runs/flow-run/{stuck['run']}")
    with get_client(sync_client=True) as client:
        for deployment in (ours, others):
            client.delete_deployment(deployment)


def test_the_verb_tests_the_targets(told: Config, web: Receiver, project: Project, capsys: pytest.CaptureFixture[str]):
    call: Any = SimpleNamespace(obj=Context.of(None, project.root), command_path="lcmlora notify")
    verbs.notify(call, ["team"])
    assert capsys.readouterr().out == "team: took the message\n"
    assert web.documents[-1]["kind"] == "test"
    with pytest.raises(SystemExit, match="1"):
        verbs.notify(call)
    assert "warning: notify.targets.dog: the environment variable UNSET is not set" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unknown target 'cat': params\.yaml"):
        verbs.notify(call, ["cat"])
