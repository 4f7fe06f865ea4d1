import shutil
import time
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.settings import PREFECT_API_URL, temporary_settings

from lcmlora import config
from lcmlora.flows.watch import _memory, data_sets, watch_inputs
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
    assert "lcmlora.base.a" in changed_resources("lcmlora.base.changed")


def changed_resources(event: str) -> set[str]:
    """Returns the resources of the events of this name, waiting until the server has them."""
    event_filter = EventFilter(event=EventNameFilter(name=[event])).model_dump(mode="json")
    until = time.monotonic() + 30
    resources: set[str] = set()
    with get_client(sync_client=True) as client:
        while "lcmlora.base.a" not in resources and time.monotonic() < until:
            time.sleep(0.2)
            found = client.request("POST", "/events/filter", json={"filter": event_filter}).json()["events"]
            resources = {each["resource"]["prefect.resource.id"] for each in found}
    return resources


def test_without_a_server_each_project_of_a_machine_has_a_memory_of_its_own(
    watched: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = config.load()
    shared = _memory(settings)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        own = _memory(settings)
        monkeypatch.chdir(tmp_path)
        assert own != _memory(settings) != shared
    assert own.startswith(f"{shared}_") and _memory(settings) == shared
