import datetime
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.variables import Variable

from lcmlora import config
from lcmlora.data.sources.source import Record, write_records
from lcmlora.flows import production_prompts, watch
from lcmlora.flows.memory import Memory
from lcmlora.flows.watch import BASE_CHANGED, DATASET_CHANGED, data_sets, look, watch_inputs
from lcmlora.tasks.output import slug
from tests.flows.conftest import Project


@pytest.fixture
def watched(project: Project, base_folder: Path) -> Project:
    """A project whose pictures are a folder, and whose bases are two copies of the miniature."""
    (project.root / "data/in").mkdir(parents=True)
    (project.root / "data/in/cat.txt").write_text("cat")
    raw = yaml.safe_load((project.root / "params.yaml").read_text())
    raw["data"] |= {"source": "folder", "path": "data/in"}
    for model in ("a", "b"):
        shutil.copytree(base_folder, project.root / "sources" / model)
        raw["bases"][model] = raw["bases"][model] | {"source": f"sources/{model}"}
    raw["registry"]["experiment"] = project.root.parent.name  # what one test's flow remembers is not another's
    (project.root / "params.yaml").write_text(yaml.safe_dump(raw))
    return project


def test_the_first_look_remembers_and_each_change_is_told_once(watched: Project):
    def look() -> tuple[str, str]:
        state = watch_inputs(return_state=True)
        assert state.is_completed(), state.message
        return state.name, state.message

    assert look() == ("Unchanged", "nothing has changed")
    (watched.root / "data/in/dog.txt").write_text("dog")
    assert look() == ("Changed", "the data set at data/in has changed")
    assert look() == ("Unchanged", "nothing has changed")
    (watched.root / "sources/b/model_index.json").touch()
    name, message = look()
    assert name == "Changed"
    assert message.startswith("the base of b, sources/b, is at ")
    assert look() == ("Unchanged", "nothing has changed")


def test_a_model_with_pictures_of_its_own_is_told_of_by_itself(watched: Project):
    (watched.root / "data/own").mkdir()
    (watched.root / "data/own/fox.txt").write_text("fox")
    watched.change(lambda raw: raw["bases"]["b"].update(data={"path": "data/own"}))
    settings = config.load(watched.root / "params.yaml")
    assert {key: (data.path, models) for key, (data, models) in data_sets(settings).items()} == {
        "dataset": ("data/in", ["a"]),
        "dataset.b": ("data/own", ["b"]),
    }
    assert watch_inputs(return_state=True).name == "Unchanged"
    (watched.root / "data/own/owl.txt").write_text("owl")
    assert watch_inputs(return_state=True).message == "the data set at data/own has changed"


def test_what_cannot_be_looked_at_fails_the_watch_and_the_rest_is_told(watched: Project):
    watch_inputs()
    shutil.rmtree(watched.root / "data/in")
    (watched.root / "sources/a/model_index.json").touch()
    state = watch_inputs(return_state=True)
    assert state.is_failed()
    assert state.message == "data/in: no such file or folder"
    found = events(BASE_CHANGED, lambda found: "lcmlora.base.a" in map(resource, found))
    assert "lcmlora.base.a" in map(resource, found)


def resource(event: dict[str, Any]) -> str:
    return str(event["resource"]["prefect.resource.id"])


class Killed(BaseException):
    """The end of the process, wherever it is raised."""


def killing_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int = 1) -> None:
    """Ends the process instead of this call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def killed(*arguments: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(owner, name, killed)


def test_a_change_is_told_once_more_and_never_lost_if_the_flow_is_killed_at_any_moment(
    watched: Project, monkeypatch: pytest.MonkeyPatch
):
    settings = config.load()
    assert look(settings) == ([], [])
    told, ids = "the data set at data/in has changed", set[str]()
    # The moments: before the change is kept, before its event is sent, before it is kept that it was sent.
    for number, (owner, name, call, again) in enumerate(
        ((Memory, "write", 1, False), (watch, "_send", 1, True), (Memory, "write", 2, True))
    ):
        (watched.root / "data/in" / f"dog{number}.txt").write_text("dog")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing_at(patch, owner, name, call)
            look(settings)
        pending = Memory("watch", settings).read()["dataset"].get("event")
        ((line,), errors) = look(settings)
        assert errors == [] and line.startswith(told) and ("told again" in line) is again
        assert (pending is not None) is again
        ids |= {str(pending)} if again else set()
        assert look(settings) == ([], [])
    on_server = [each["id"] for each in events(DATASET_CHANGED, lambda found: ids <= {each["id"] for each in found})]
    assert len(ids) == 2 and sorted(ids) == sorted(each for each in on_server if each in ids)


def test_an_event_that_prefect_does_not_take_is_told_by_the_next_look(
    watched: Project, monkeypatch: pytest.MonkeyPatch
):
    settings = config.load()
    look(settings)
    (watched.root / "sources/b/model_index.json").touch()

    def away(*arguments: Any) -> None:
        raise httpx.ConnectError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "_send", away)
        assert look(settings) == (
            [],
            ["base.b: Prefect did not take what has changed: connection refused; the next look tells it again"],
        )
    ((line,), _) = look(settings)
    assert line.startswith("the base of b, sources/b, is at ")


def test_more_bases_than_one_variable_can_hold_are_remembered_whatever_their_names(watched: Project):
    memory = Memory("watch", config.load())
    names = ["A.b", "a-b", "a_b", *(f"{'long-name-' * 6}{number:03}" for number in range(57))]
    entries = {f"base.{name}": {"seen": "0" * 64, "day": "2026-11-29"} for name in names}
    for key, entry in entries.items():
        memory.write(key, entry)
    assert memory.read() == entries
    memory.forget("base.a-b")
    assert memory.read().keys() == entries.keys() - {"base.a-b"}


def test_what_the_version_before_remembered_in_one_variable_is_taken_over(watched: Project):
    assert watch_inputs(return_state=True).name == "Unchanged"
    memory, settings = Memory("watch", config.load()), config.load()
    states = {key: entry["seen"] for key, entry in memory.read().items()}
    for key in states:
        memory.forget(key)
    former = f"watch_{slug(settings.registry.experiment)}"
    Variable.set(former, states | {"dataset": "as it was before", "base.gone": "x"})
    assert watch_inputs(return_state=True).message == "the data set at data/in has changed"
    assert Variable.get(former, default=None) is None
    assert memory.read().keys() == {*states, "base.gone"}  # perhaps still a model of another clone


def test_what_was_not_looked_at_for_a_month_is_forgotten(watched: Project):
    memory, now = Memory("watch", config.load()), datetime.datetime.now(datetime.UTC)
    for days in (29, 31):
        memory.write(f"base.{days}", {"seen": "x", "day": (now - datetime.timedelta(days)).date().isoformat()})
    watch_inputs()
    assert memory.read().keys() == {"dataset", "base.a", "base.b", "base.29"}


@pytest.mark.slow
def test_sixty_bases_are_watched(watched: Project, base_folder: Path):
    names = [f"base-of-sixty-{number}" for number in range(60)]

    def sixty(raw: dict[str, Any]) -> None:
        raw["bases"] |= {name: raw["bases"]["a"] | {"source": f"sources/{name}"} for name in names}
        raw["models"] = names

    for name in names:
        shutil.copytree(base_folder, watched.root / "sources" / name)
    watched.change(sixty)
    assert watch_inputs(return_state=True).name == "Unchanged"
    (watched.root / "sources" / names[-1] / "model_index.json").touch()
    state = watch_inputs(return_state=True)
    assert state.name == "Changed" and state.message.startswith(f"the base of {names[-1]}, ")


def events(name: str, expected: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """Returns the events of this name on the server, waiting until they are as expected."""
    event_filter = EventFilter(event=EventNameFilter(name=[name])).model_dump(mode="json")
    until = time.monotonic() + 30
    found: list[dict[str, Any]] = []
    with get_client(sync_client=True) as client:
        while not expected(found) and time.monotonic() < until:
            time.sleep(0.2)
            found = client.request("POST", "/events/filter", json={"filter": event_filter}).json()["events"]
    return found


def test_without_a_server_each_project_of_a_machine_has_a_memory_of_its_own(
    watched: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = config.load()
    for folder in (watched.root, tmp_path):  # two clones of one project
        (folder / "prefect.yaml").write_text("name: owls\n")

    def name() -> str:
        return Memory("watch", settings).name("dataset")

    shared = name()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        own = name()
        monkeypatch.chdir(tmp_path)
        assert len({own, name(), shared}) == 3
    assert name() == shared


def keep_prompts(watched: Project, texts: list[str], ago: int) -> None:
    """Lets prompts lie there as a server has kept them so many days ago."""
    day = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(ago)).date()
    folder = watched.root / "prompts/a"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"key": number / len(texts), "prompt": text}) for number, text in enumerate(texts)]
    (folder / f"{day}.jsonl").write_text("".join(f"{line}\n" for line in lines))


ASKED = [f"tree {number} on the moon" for number in range(60)]


def test_no_day_is_compared_twice_and_few_or_fresh_prompts_are_waited_for(watched: Project):
    watched.change(lambda raw: raw.update(serving={"keep_prompts": "text", "drift_days": 3}))
    settings = config.load(watched.root / "params.yaml")

    def due(until: str | None = None) -> tuple[int, int] | None:
        found = production_prompts._due("a", settings, until)
        today = datetime.datetime.now(datetime.UTC).date()
        return found and tuple((today - datetime.date.fromisoformat(day)).days for day in found)

    assert due() is None  # nothing is kept
    keep_prompts(watched, ASKED, ago=0)
    assert due() is None  # the day goes on
    keep_prompts(watched, ASKED, ago=2)
    assert due() is None  # more days are waited for
    keep_prompts(watched, ["the same"] * 500, ago=5)
    assert due() == (5, 2)
    day = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(5)).date()
    assert due(until=day.isoformat()) is None
    keep_prompts(watched, ["the same"] * 500, ago=2)
    assert due() is None  # too few different ones


@pytest.mark.slow
def test_drift_is_told_when_it_begins_and_no_second_time(watched: Project, base_folder: Path):
    """With the text encoder of the base, in another process."""
    watched.change(lambda raw: raw.update(serving={"keep_prompts": "text", "drift_days": 1}))
    (watched.root / "bases").mkdir()
    (watched.root / "bases/a").symlink_to(base_folder)
    (watched.root / "data/pictures").mkdir(parents=True)
    captions = [f"red apple {number}" for number in range(150)]
    for part in ("train", "validation", "test"):
        records = [Record(str(n), text, "ab" * 32, 8, 8) for n, text in enumerate(captions)]
        write_records(watched.root / f"data/pictures/{part}.jsonl", records)

    def look() -> str:
        state = watch_inputs(return_state=True)
        assert state.is_completed(), state.message
        return str(state.message)

    assert look() == "nothing has changed"
    keep_prompts(watched, captions[:70], ago=9)
    assert look() == "nothing has changed"
    keep_prompts(watched, ASKED, ago=8)
    assert look().startswith("the prompts of a have drifted from its training captions: prompts from ")
    assert look() == "nothing has changed"
    keep_prompts(watched, ASKED, ago=7)
    assert look() == "nothing has changed"  # they are still drifted
    keep_prompts(watched, captions[:70], ago=6)
    assert look() == "nothing has changed"  # and are like the captions again
    keep_prompts(watched, ASKED, ago=5)
    assert look().startswith("the prompts of a have drifted")
