"""Lists, standings and recent events of many versions: right, and with as many questions for few as for many.

Two registries hold 12 and 48 versions. What asks both the same number of questions asks none for each version or model.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from typer.testing import CliRunner

from lcmlora import registry
from lcmlora.cli.main import app
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.gate import record
from lcmlora.registry import events, promotion
from lcmlora.registry.listing import current, main_figures, recent, search
from lcmlora.registry.listing.conditions import condition
from lcmlora.registry.tracking import connect
from tests.support import many_versions, registries
from tests.support.many_versions import EXCESS, Made, fill, model_name

ALL = record(Metrics.read(Path("metrics/emoji.json")))
FIGURES = {key: value for key, value in ALL.items() if "student_4" in key}
SIZES = {"few": (4, 3), "many": (12, 4)}  # models, nights


@pytest.fixture(scope="module", params=["now", "0.1.0"])
def places(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Registry, list[Made]]]:
    """Both registries, as this version and as 0.1.0 has registered, and what was written into them."""
    found = {}
    for size, (models, nights) in SIZES.items():
        settings = registries.fresh(tmp_path_factory.mktemp(size), tmp_path_factory)
        found[size] = settings, fill(settings, models, nights, FIGURES, former=request.param == "0.1.0")
    return found


@pytest.fixture
def many(places: dict[str, tuple[Registry, list[Made]]]) -> tuple[Registry, list[Made]]:
    return places["many"]


@pytest.fixture
def is_former(request: pytest.FixtureRequest) -> bool:
    return "0.1.0" in request.node.name


class Statements:
    """Counts what is asked of databases."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        self.count += not statement.startswith("PRAGMA")


@pytest.fixture
def statements() -> Iterator[Statements]:
    counted = Statements()
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", counted)
    yield counted
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", counted)


def ago(days: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)


def names(models: int) -> list[str]:
    return [model_name(number) for number in range(models)]


QUESTIONS: dict[str, Callable[[Registry, list[str]], object]] = {
    "all": lambda settings, names: search.find(settings),
    "all with all figures": lambda settings, names: registry.versions(settings),
    "newest": lambda settings, names: search.find(settings, newest=5),
    "two filters": lambda settings, names: search.find(
        settings, conditions=[condition("objective=tcd"), condition("excess.student_4<80")]
    ),
    "a model": lambda settings, names: search.find(settings, names[0]),
    "history": lambda settings, names: promotion.history(names[0], settings),
    "champion": lambda settings, names: registry.resolve(f"{names[0]}@champion", settings),
    "current": current.read,
    "recent": lambda settings, names: recent.read(settings, names, ago(2)),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_many_versions_are_asked_for_with_as_many_statements_as_few(
    places: dict[str, tuple[Registry, list[Made]]], question: str, statements: Statements, is_former: bool
):
    if is_former and question in ("current", "recent"):
        pytest.skip("0.1.0 left no tags by which these are searched, so each model is asked for")
    counts = {}
    for size, (settings, _) in places.items():
        models = names(SIZES[size][0])
        QUESTIONS[question](settings, models)  # the first call of a process looks at the database's version, too
        before = statements.count
        QUESTIONS[question](settings, models)
        counts[size] = statements.count - before
    assert counts["few"] == counts["many"] < 40, counts


def test_the_newest_come_first_and_it_is_said_that_there_are_more(many: tuple[Registry, list[Made]]):
    settings, made = many
    expected = [(each.name, each.version) for each in reversed(made)]
    found = search.find(settings, newest=5)
    assert ([(each.name, each.version) for each in found.versions], found.more) == (expected[:5], True)
    found = search.find(settings, newest=48)
    assert ([(each.name, each.version) for each in found.versions], found.more) == (expected, False)
    own = search.find(settings, model_name(3), newest=2)
    assert ([each.version for each in own.versions], own.more) == ([4, 3], True)


def test_what_the_database_finds_is_what_a_test_of_every_version_finds(
    many: tuple[Registry, list[Made]], monkeypatch: pytest.MonkeyPatch
):
    """Also where the pages are smaller than what is found."""
    settings, made = many
    for name in ("PAGE", "DATABASE_PAGE"):
        monkeypatch.setattr(search, name, 7)
    every = registry.versions(settings)
    assert [(each.name, -each.version) for each in every] == sorted((each.name, -each.version) for each in made)
    assert all(each.figure(EXCESS) == one.excess for each, one in zip(every, _sorted(made), strict=True))
    assert every[0].metrics.keys() == FIGURES.keys()
    for texts in (
        ["objective=tcd", "excess.student_4<80"],
        ["gate=passed", "excess.student_4>70", "version=2"],
        ["name=lcm-lora-model003"],
        ["energy_kwh=0.221", "retrieval.student_4>0.5"],
        ["price=1.19 EUR", "diversity.student_4>0.4"],  # a figure that is no main one
        ["gate_reason=None"],
        ["gate_reason=student@4: excess is worse than the champion's"],
        ["objective=nothing"],
    ):
        conditions = [condition(text) for text in texts]
        expected = {each.reference for each in every if all(test(each) for test in conditions)}
        found = search.find(settings, conditions=conditions).versions
        assert {each.reference for each in found} == expected, texts
        assert expected or texts == ["objective=nothing"]
        assert len(found) == len(expected)


def _sorted(made: list[Made]) -> list[Made]:
    return sorted(made, key=lambda each: (each.name, -each.version))


def test_the_database_decides_what_it_can(many: tuple[Registry, list[Made]]):
    assert condition("objective=tcd").search == "tags.`objective` = 'tcd'"
    assert condition("version=3").search == "version_number = 3"
    assert condition("my tag=x").search == "tags.`my tag` = 'x'"
    for text in ("approval=awaiting", "git_dirty=None", "a`b=c", "objective=it's", "version=three", "excess<3"):
        assert condition(text).search is None, text


def test_a_model_without_versions_that_match_is_told_from_one_that_is_not_registered(many: tuple[Registry, list[Made]]):
    settings, _ = many
    assert search.find(settings, model_name(0), [condition("objective=tcd")]).versions == []
    with pytest.raises(UserError, match=r"^lcm-lora-nothing: not registered at sqlite:"):
        search.find(settings, "lcm-lora-nothing", [condition("objective=tcd")])


def test_champions_and_newest_versions_are_those_of_a_whole_list(many: tuple[Registry, list[Made]]):
    settings, made = many
    wanted = names(10)
    found = current.read(settings, [*wanted, "lcm-lora-nothing"])
    assert found.keys() == set(wanted)
    passed = {each.name: each for each in made if each.passed}
    older = 0
    for name, (champion, newest) in found.items():
        assert newest is not None and newest.version == 4
        if name in passed:
            one = passed[name]
            assert champion is not None and (champion.version, champion.sha256) == (one.version, one.tags["sha256"])
            assert champion.figure(EXCESS) == one.excess and champion.aliases == ("champion",)
            assert champion.promoted is not None and champion.promoted[:10] == f"{one.created:%Y-%m-%d}"
            older += champion.version != 4
        else:
            assert champion is None
    assert older > 1


def test_events_of_the_last_days_are_those_of_the_whole_history(many: tuple[Registry, list[Made]]):
    settings, _ = many
    wanted = names(10)
    for days in (0.1, 2, 30):
        since = ago(days)
        every = [recent.Happened(name, event) for name in wanted for event in promotion.history(name, settings)]
        expected = [each for each in every if datetime.datetime.fromisoformat(each.event.time) >= since]
        assert recent.read(settings, wanted, since) == sorted(expected, key=lambda each: each.event.time)
    assert expected


def test_promotions_decisions_and_moved_aliases_are_seen_at_once(tmp_path_factory: pytest.TempPathFactory):
    settings = registries.fresh(tmp_path_factory.mktemp("changing"), tmp_path_factory)
    fill(settings, 2, 10, FIGURES)
    name, other = names(2)
    oldest = registry.resolve(f"{name}/1", settings)
    promotion.promote_passed(oldest, settings, reason="sharper", who="ada")
    assert [
        (each.name, each.event.version, each.event.who) for each in recent.read(settings, [name, other], ago(0.01))
    ] == [(name, 1, "ada")]
    assert current.read(settings, [name])[name].champion == search.find(settings, name).versions[-1]
    client = connect(settings)
    client.set_registered_model_alias(name, "champion", "2")  # on MLflow's page
    found = current.read(settings, [name, other])
    assert found[name].champion is not None and found[name].champion.version == 2
    events.write(client, name, 3, "compared", reason="better eyes", who="bob")
    assert recent.read(settings, [name], ago(0.01))[-1].event.who == "bob"
    client.set_model_version_tag(name, "10", "pruned", "2026-11-29T00:00:00")
    newest = current.read(settings, [name])[name].newest
    assert newest is not None and newest.version == 9
    assert [each.version for each in search.find(settings, name, newest=2).versions] == [9, 8]
    client.delete_registered_model_alias(name, "champion")
    assert current.read(settings, [name])[name].champion is None


def test_main_figures_that_somebody_has_edited_are_read_from_the_run(tmp_path_factory: pytest.TempPathFactory):
    settings = registries.fresh(tmp_path_factory.mktemp("edited"), tmp_path_factory)
    made = fill(settings, 1, 3, FIGURES)
    for number, text in enumerate(("no JSON", "[1]", '{"excess.student_4": "low"}'), 1):
        connect(settings).set_model_version_tag(model_name(0), str(number), main_figures.TAG, text)
    found = search.find(settings).versions
    assert [each.figure(EXCESS) for each in found] == [each.excess for each in reversed(made)]


def test_the_command_lists_the_newest_hundred_and_says_so(tmp_path_factory: pytest.TempPathFactory, monkeypatch):
    settings = registries.fresh(tmp_path_factory.mktemp("long"), tmp_path_factory)
    made = fill(settings, 13, 8, {f"{many_versions.FEATURES}/{EXCESS}": 0.0})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    run = CliRunner()
    shown = run.invoke(app, ["registry", "list"])
    assert shown.stdout.count("lcm-lora-model") == 100
    assert shown.stderr == "note: these are the newest 100; --limit 0 lists all, and --where or MODEL fewer\n"
    shown = run.invoke(app, ["registry", "list", "--limit", "0"])
    assert (shown.stdout.count("lcm-lora-model"), shown.stderr) == (104, "")
    shown = run.invoke(app, ["registry", "list", "--json", "--limit", "2", "--where", "gate=rejected"])
    rejected = [each for each in reversed(made) if not each.passed]
    listed = json.loads(shown.stdout)
    assert [(each["name"], each["version"]) for each in listed] == [(one.name, one.version) for one in rejected[:2]]
    assert listed[0]["metrics"] == {f"{many_versions.FEATURES}/{EXCESS}": rejected[0].excess}
