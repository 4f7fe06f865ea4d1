"""A person's yes or no to a version: who, when, why, in time or too late, one after the other or at once."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Gate, Registry
from lcmlora.errors import UserError
from lcmlora.registry import events, promotion
from lcmlora.registry.approval import decisions
from lcmlora.registry.approval.standing import APPROVED, DECLINED, REQUESTED, SUPERSEDED, TIMED_OUT, standing
from lcmlora.registry.events import Event
from lcmlora.registry.lookup import resolve
from lcmlora.registry.promotion import history, promote, rollback
from lcmlora.registry.registration import register_release
from tests.registry.test_promotion import NAME, add, aliases, settings

__all__ = ["settings"]  # the fixture

GATE = Gate(approval="required", approval_days=7)


def ask(registry: Registry, weights: str, **figures: Any) -> int:
    version = add(registry, weights, **figures)
    assert decisions.request(NAME, version.version, registry, reason="passed the gate") is not None
    return version.version


def actions(registry: Registry, version: int) -> list[tuple[str, str, str | None]]:
    return [(e.action, e.who, e.reason) for e in history(NAME, registry) if e.version == version][2:]


def test_an_approved_version_becomes_champion_and_the_history_says_by_whom_and_why(
    settings: Registry, capsys: pytest.CaptureFixture[str]
):
    ask(settings, "one")
    assert [each.reference for each in decisions.waiting(NAME, settings)] == [f"{NAME}/1"]
    version = decisions.approve(f"{NAME}/1", settings, GATE, reason="hands are right", who="ada")
    assert version.aliases == ("champion",)
    assert actions(settings, 1) == [
        ("approval requested", events.user(), "passed the gate"),
        ("approved", "ada", "hands are right"),
        ("promoted", "ada", "approved: hands are right"),
    ]
    assert decisions.waiting(NAME, settings) == []
    before = history(NAME, settings)
    assert "note: " not in capsys.readouterr().err
    assert decisions.approve(f"{NAME}/1", settings, GATE, reason="again").version == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said.startswith("note: lcm-lora-mini/1 is champion already (approved by ada on ")
    assert said.endswith(": hands are right); nothing was written")
    assert decisions.request(NAME, 1, settings, reason="passed the gate") is None
    assert history(NAME, settings) == before
    with pytest.raises(UserError, match="lcm-lora-mini/1: is champion; `lcmlora registry rollback` takes it back"):
        decisions.reject(f"{NAME}/1", settings, reason="no")


def test_a_rejected_adapter_stays_rejected_until_a_person_overrides_it(settings: Registry):
    ask(settings, "one")
    decisions.reject(f"{NAME}/1", settings, reason="blurred", who="bob")
    again = register_release("mini", settings, Path("one"))
    assert again.approval is not None and again.approval.state == "rejected"
    assert decisions.request(NAME, 1, settings, reason="passed the gate") is None
    assert decisions.reject(f"{NAME}/1", settings, reason="twice").version == 1
    said = r"lcm-lora-mini/1: approval rejected by bob on \d{4}-\d\d-\d\d: blurred; to make it champion anyway, use"
    with pytest.raises(UserError, match=said):
        decisions.approve(f"{NAME}/1", settings, GATE, reason="yes")
    for gate in (GATE, Gate()):  # also if approval is not required any more
        with pytest.raises(UserError, match=said):
            promote(f"{NAME}/1", settings, gate, reason="yes")
    assert aliases(settings) == {}
    assert promote(f"{NAME}/1", settings, GATE, reason="agreed", override=True).approval == "approved"


def test_a_newer_version_takes_the_place_of_one_that_waits(settings: Registry):
    ask(settings, "one")
    ask(settings, "two")
    assert [each.version for each in decisions.waiting(NAME, settings)] == [2]
    assert actions(settings, 1)[1][::2] == ("approval superseded", f"{NAME}/2 waits in its place")
    with pytest.raises(UserError, match=r"approval superseded on .*: lcm-lora-mini/2 waits in its place"):
        decisions.approve(f"{NAME}/1", settings, GATE, reason="yes")
    # The first adapter came again, and takes its place back.
    assert decisions.request(NAME, 1, settings, reason="passed the gate") is not None
    assert [each.version for each in decisions.waiting(NAME, settings)] == [1]


def test_who_comes_too_late_has_let_it_be_rejected(settings: Registry, monkeypatch: pytest.MonkeyPatch):
    ask(settings, "one")
    assert decisions.expire(NAME, settings, GATE) == []
    at_once = Gate(approval="required", approval_days=1e-9)
    with pytest.raises(UserError, match=r"approval timed out on .*: nobody decided within 1e-09 days; to make it"):
        decisions.approve(f"{NAME}/1", settings, at_once, reason="yes")
    assert actions(settings, 1)[-1][0] == "approval timed out" and aliases(settings) == {}
    assert decisions.expire(NAME, settings, at_once) == []
    ask(settings, "two")
    assert decisions.expire(NAME, settings, at_once) == [f"{NAME}/2"]
    with pytest.raises(UserError, match=r"roll back to a version that was champion before"):
        promotion.promote_passed(add(settings, "three"), settings, reason="x")
        rollback(NAME, settings, reason="x", to=2)


def test_where_approval_is_required_promoting_needs_it_and_approving_checks_the_champion(settings: Registry):
    first = add(settings, "one")
    with pytest.raises(UserError, match=r"needs approval \(gate.approval\); `lcmlora approve lcm-lora-mini/1` gives"):
        promote(f"{NAME}/1", settings, Gate(approval=("mini",)), reason="x")
    assert promote(f"{NAME}/1", settings, Gate(approval=("other",)), reason="x").aliases == ("champion",)
    assert first.approval is None
    ask(settings, "worse", distance_teacher={"student@4": 99.0}, excess={"student@4": 21.0})
    with pytest.raises(UserError, match=r"worse than .*lcm-lora-mini/1"):
        decisions.approve(f"{NAME}/2", settings, GATE, reason="yes")
    assert len(decisions.waiting(NAME, settings)) == 1  # nothing was decided
    add(settings, "early")  # nobody was asked yet
    assert decisions.approve(f"{NAME}/3", settings, GATE, reason="yes").aliases == ("champion",)
    add(settings, "failed", rejected="excess 9 is above 8")
    with pytest.raises(UserError, match="does not wait for approval: it did not pass the gate"):
        decisions.approve(f"{NAME}/4", settings, GATE, reason="yes")


def test_of_two_people_at_once_the_first_decides(settings: Registry, monkeypatch: pytest.MonkeyPatch):
    ask(settings, "one")
    write = decisions._write

    def after_another(*arguments: Any) -> None:
        monkeypatch.setattr(decisions, "_write", write)
        decisions.reject(f"{NAME}/1", settings, reason="blurred", who="bob")
        write(*arguments)

    monkeypatch.setattr(decisions, "_write", after_another)
    with pytest.raises(UserError, match=r"approval rejected by bob on .*, at the same time; nothing was promoted"):
        decisions.approve(f"{NAME}/1", settings, GATE, reason="yes", who="ada")
    assert aliases(settings) == {}
    assert resolve(f"{NAME}/1", settings).approval == "rejected"


def test_an_approval_that_is_killed_before_the_alias_moves_is_completed(
    settings: Registry, monkeypatch: pytest.MonkeyPatch
):
    ask(settings, "one")

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(promotion, "promote_passed", killed)
        decisions.approve(f"{NAME}/1", settings, GATE, reason="yes", who="ada")
    found = register_release("mini", settings, Path("one")).approval
    assert found is not None and found.state == "approved"  # by which the next run promotes it
    assert decisions.approve(f"{NAME}/1", settings, GATE, reason="yes", who="ada").aliases == ("champion",)
    assert [action for action, _, _ in actions(settings, 1)].count("approved") == 1


@pytest.mark.parametrize(
    ("past", "state"),
    [
        ([], None),
        (["registered", "passed", "promoted"], None),
        ([REQUESTED], "awaiting"),
        ([REQUESTED, APPROVED, DECLINED, TIMED_OUT], "approved"),
        ([REQUESTED, DECLINED, APPROVED, REQUESTED], "rejected"),
        ([REQUESTED, TIMED_OUT, APPROVED, REQUESTED], "timed out"),
        ([REQUESTED, SUPERSEDED, APPROVED], "superseded"),
        ([REQUESTED, SUPERSEDED, REQUESTED, APPROVED], "approved"),
        ([REQUESTED, SUPERSEDED, DECLINED], "rejected"),
        ([DECLINED], "rejected"),
        ([TIMED_OUT], None),
        ([REQUESTED, DECLINED, "promoted"], "approved"),
    ],
)
def test_the_first_decision_holds(past: list[str], state: str | None):
    start = datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC)
    record = [
        Event(
            (start + datetime.timedelta(hours=hour)).isoformat(),
            action,
            1,
            "ada",
            alias="champion" if action == "promoted" else None,
        )
        for hour, action in enumerate(past)
    ]
    found = standing(record, "champion")
    assert (found.state if found else None) == state
