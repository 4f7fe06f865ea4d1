"""Who is champion, and the history that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lcmlora.config import Gate, Registry
from lcmlora.errors import UserError
from lcmlora.registry.lookup import resolve
from lcmlora.registry.promotion import history, promote, promote_passed, rollback
from lcmlora.registry.registration import Registered, register_release
from tests.support.registries import fresh
from tests.support.releases import write_sealed

GATE = Gate(steps=4, min_retrieval=0.8)
NAME = "lcm-lora-mini"


@pytest.fixture
def settings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    return fresh(tmp_path, tmp_path_factory)


def add(settings: Registry, weights: str, *, rejected: str = "", **figures: Any) -> Registered:
    """Registers an adapter of these bytes, whose metrics.json has these changes."""
    folder = write_sealed(Path(weights), weights=weights.encode(), metrics=figures)
    return register_release("mini", settings, folder, gate_failures=[rejected] if rejected else [])


def aliases(settings: Registry) -> dict[str, int]:
    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    return {alias: int(number) for alias, number in client.get_registered_model(NAME).aliases.items()}


def promotions(settings: Registry) -> list[tuple[str, int, int | None]]:
    return [(e.action, e.version, e.former) for e in history(NAME, settings) if e.alias]


def test_the_champion_before_is_previous_and_the_history_says_who_when_and_why(settings: Registry):
    first, second = add(settings, "one"), add(settings, "two")
    assert promote_passed(first, settings, reason="passed the gate") == f"{NAME}@champion"
    assert aliases(settings) == {"champion": 1}
    promote_passed(second, settings, reason="sharper", who="ada")
    assert aliases(settings) == {"champion": 2, "previous": 1}
    events = history(NAME, settings)
    assert [(e.action, e.version) for e in events[:4]] == [
        ("registered", 1),
        ("passed", 1),
        ("registered", 2),
        ("passed", 2),
    ]
    assert (events[5].who, events[5].reason, events[5].former, events[5].override) == ("ada", "sharper", 1, False)
    assert [e.time for e in events] == sorted(e.time for e in events)
    before = [v.updated for v in (resolve(f"{NAME}/1", settings), resolve(f"{NAME}/2", settings))]
    promote_passed(second, settings, reason="again")
    assert history(NAME, settings) == events
    assert before == [v.updated for v in (resolve(f"{NAME}/1", settings), resolve(f"{NAME}/2", settings))]


def test_rolling_back_goes_further_back_each_time_and_never_forth(settings: Registry):
    for weights in ("one", "two", "three"):
        promote_passed(add(settings, weights), settings, reason="better")
    assert rollback(NAME, settings, reason="blurred", who="bob").version == 2
    assert aliases(settings) == {"champion": 2, "previous": 1}
    assert rollback(NAME, settings, reason="still blurred").version == 1
    assert aliases(settings) == {"champion": 1}
    with pytest.raises(UserError, match="lcm-lora-mini/1: is the first champion; name the version to go to"):
        rollback(NAME, settings, reason="no")
    assert rollback(NAME, settings, reason="mended elsewhere", to=3).version == 3
    assert aliases(settings) == {"champion": 3, "previous": 1}
    with pytest.raises(UserError, match="lcm-lora-mini/3: is champion already"):
        rollback(NAME, settings, reason="no", to=3)
    with pytest.raises(UserError, match="lcm-lora-mini/9: not registered"):
        rollback(NAME, settings, reason="no", to=9)
    assert promotions(settings)[3:] == [("rolled back", 2, 3), ("rolled back", 1, 2), ("rolled back", 3, 1)]
    assert register_release("mini", settings, Path("two")).promoted  # so that no flow promotes it again


def test_without_a_champion_there_is_nothing_to_roll_back(settings: Registry):
    add(settings, "one")
    with pytest.raises(UserError, match="no version has champion"):
        rollback(NAME, settings, reason="no")
    with pytest.raises(UserError, match="lcm-lora-nothing: not registered"):
        rollback("lcm-lora-nothing", settings, reason="no")


def test_a_rejected_version_becomes_champion_only_against_the_gate_and_the_history_says_so(settings: Registry):
    add(settings, "one", rejected="student@4: too blurred")
    with pytest.raises(UserError, match=r"lcm-lora-mini/1: student@4: too blurred; to make it champion .*--override"):
        promote(f"{NAME}/1", settings, GATE, reason="please")
    assert aliases(settings) == {}
    assert promote(f"{NAME}/1", settings, GATE, reason="agreed", who="ada", override=True).aliases == ("champion",)
    actions = [(e.action, e.reason, e.override) for e in history(NAME, settings)]
    assert actions == [
        ("registered", None, False),
        ("rejected", "student@4: too blurred", False),
        ("promoted", "agreed", True),
    ]


def test_a_worse_version_is_refused_with_figure_and_difference_and_a_better_one_is_not(settings: Registry):
    chance = {
        "level": 0.95,
        "resamples": 200,
        "excess": {"student@4": [3.0, 6.0]},
        "retrieval": {"student@4": [0.8, 0.9]},
    }
    promote_passed(add(settings, "one", intervals=chance), settings, reason="first")
    excess = {"student@4": 9.0}
    add(settings, "two", excess=excess, intervals=chance)
    with pytest.raises(UserError, match=r"excess distance 9\.000 is worse than lcm-lora-mini/1's 4\.500 by 4\.500"):
        promote(f"{NAME}/2", settings, GATE, reason="please")
    lenient = GATE.model_copy(update={"champion": False})
    assert promote(f"{NAME}/2", settings, lenient, reason="not compared").version == 2
    add(settings, "three", excess={"student@4": 9.5}, intervals=chance)
    assert promote(f"{NAME}/3", settings, GATE, reason="within chance").aliases == ("champion",)


def test_versions_measured_on_other_prompts_are_not_compared_behind_ones_back(settings: Registry):
    promote_passed(add(settings, "one", reference_digest="a" * 64), settings, reason="first")
    add(settings, "two", reference_digest="b" * 64)
    with pytest.raises(UserError, match=r"cannot be compared with lcm-lora-mini/1, the champion: .*reference_digest"):
        promote(f"{NAME}/2", settings, GATE, reason="please")


def test_a_promotion_killed_before_its_event_is_completed_by_the_next_call(settings: Registry):
    first, second = add(settings, "one"), add(settings, "two")
    promote_passed(first, settings, reason="first")
    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    client.set_registered_model_alias(NAME, "champion", "2")
    promote_passed(second, settings, reason="second")
    assert promotions(settings) == [("promoted", 1, None), ("promoted", 2, 1)]
    assert aliases(settings) == {"champion": 2, "previous": 1}


def test_a_champion_that_was_made_in_mlflows_own_pages_can_be_rolled_back_to(settings: Registry):
    for weights in ("one", "two", "three"):
        add(settings, weights)
    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    client.set_registered_model_alias(NAME, "champion", "1")
    promote_passed(resolve(f"{NAME}/3", settings), settings, reason="third")
    assert aliases(settings) == {"champion": 3, "previous": 1}
    client.set_registered_model_alias(NAME, "champion", "2")
    assert rollback(NAME, settings, reason="no").version == 3


def test_a_release_in_several_stores_is_recorded_with_all_of_them_and_keeps_one_that_failed_later(settings: Registry):
    def published(*uris: str | None) -> list[str]:
        register_release("mini", settings, folder, uris[0], [], uris[1:])
        return resolve(f"{NAME}/1", settings).uris

    folder = write_sealed(Path("one"))
    assert published("file:///a") == ["file:///a"]
    assert "release_uris" not in resolve(f"{NAME}/1", settings).tags
    assert published("file:///a", None) == ["file:///a"]
    assert published(None, "hf://owls/mini/b") == ["file:///a", "hf://owls/mini/b"]
    assert published("file:///a", None, "s3://c") == ["file:///a", "s3://c", "hf://owls/mini/b"]
    assert resolve(f"{NAME}/1", settings).release_uri == "file:///a"


def test_a_gate_that_decides_otherwise_than_before_is_an_event(settings: Registry):
    add(settings, "one", rejected="too blurred")
    register_release("mini", settings, Path("one"))
    register_release("mini", settings, Path("one"))
    assert [e.action for e in history(NAME, settings)] == ["registered", "rejected", "passed"]
    assert json.loads(json.dumps(resolve(f"{NAME}/1", settings).plain()))["gate_reason"] is None
