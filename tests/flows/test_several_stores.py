"""A run that publishes to several stores, of which one fails."""

from __future__ import annotations

import pytest

from lcmlora.config import load
from lcmlora.flows.retrain import retrain_models
from lcmlora.registry.lookup import resolve
from tests.flows.conftest import Project


@pytest.mark.slow
def test_a_store_that_fails_is_told_and_keeps_nothing_from_the_others_and_the_next_run_completes_it(
    project: Project, capfd: pytest.CaptureFixture[str]
):
    places = [project.root / name for name in ("releases", "second", "third")]
    project.change(lambda raw: raw["publish"].update(to=[place.name for place in places]))
    places[1].write_text("in the way")
    state = retrain_models(["a"], return_state=True)
    assert state.is_failed() and state.message.startswith("a: publish.to: cannot use second/")
    assert state.message.count("publish.to") == 1
    version = resolve("a@champion", load().registry)
    assert [uri.split("/")[-3] for uri in version.uris] == ["releases", "third"]
    table = capfd.readouterr().out
    assert table.count("sha256-") >= 2 and "error" in table
    for place in (places[0], places[2]):
        assert (place / "a/channels/champion.json").is_file()

    places[1].unlink()
    state = retrain_models(["a"], return_state=True)
    assert (state.is_completed(), state.name) == (True, "UpToDate")
    version = resolve("a@champion", load().registry)
    assert [uri.split("/")[-3] for uri in version.uris] == ["releases", "second", "third"]
    assert version.release_uri == version.uris[0]
    for place in places:
        assert (place / "a/channels/champion.json").is_file()
