"""Lists through an MLflow server ask as much for 48 versions as for 12, and give what its database has."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable

import pytest

from lcmlora.config import Registry
from lcmlora.registry import promotion
from lcmlora.registry.listing import current, recent, search
from lcmlora.registry.listing.conditions import condition
from tests.integration.tracking_servers import MLflow, PostgreSQL
from tests.support import many_versions
from tests.support.many_versions import EXCESS, FEATURES, fill, model_name

pytestmark = pytest.mark.integration


def settings_at(uri: str) -> Registry:
    return Registry(tracking_uri=uri, experiment="many", alias="champion")


def questions(settings: Registry, models: int) -> dict[str, Callable[[], object]]:
    names = [model_name(number) for number in range(models)]
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    two = [condition("objective=tcd"), condition("excess.student_4<80")]
    return {
        "all": lambda: search.find(settings),
        "two filters": lambda: search.find(settings, conditions=two),
        "history": lambda: promotion.history(names[0], settings),
        "current": lambda: current.read(settings, names),
        "recent": lambda: recent.read(settings, names, since),
    }


def test_a_server_is_asked_as_much_for_many_versions_as_for_few(
    mlflow_server: MLflow, postgresql: PostgreSQL, caplog: pytest.LogCaptureFixture
):
    directly, through = settings_at(postgresql.uri("mlflow")), settings_at(mlflow_server.uri)
    fill(directly, 12, 4, {f"{FEATURES}/{EXCESS}": 0.0})
    search.find(through, newest=1)  # the first question of a process asks for the server's version, too
    caplog.set_level(logging.DEBUG, logger="urllib3.connectionpool")
    asked = {}
    for models in (6, 12):  # both have champions that are not the newest
        for words, ask in questions(through, models).items():
            caplog.clear()
            ask()
            asked[words, models] = sum(" HTTP/1.1" in record.getMessage() for record in caplog.records)
    for words in questions(through, 12):
        assert 0 < asked[words, 12] == asked[words, 6] < 10, asked
    for words, ask in questions(through, 12).items():
        assert ask() == questions(directly, 12)[words](), words


@pytest.mark.slow
def test_ten_thousand_versions_in_postgresql_are_listed_in_pages(postgresql: PostgreSQL):
    postgresql.create("large")
    settings = settings_at(postgresql.uri("large"))
    made = fill(settings, 500, 20, {f"{FEATURES}/{EXCESS}": 0.0})
    found = search.find(settings)
    assert [(each.name, each.version) for each in found.versions] == [(one.name, one.version) for one in reversed(made)]
    matching = [one for one in reversed(made) if one.tags["objective"] == "tcd" and one.excess < 61]
    rare = search.find(settings, conditions=[condition("objective=tcd"), condition("excess.student_4<61")])
    assert [(each.name, each.version) for each in rare.versions] == [(one.name, one.version) for one in matching]
    names = [many_versions.model_name(number) for number in range(200)]
    champions = {one.name: one.version for one in made if one.passed and one.name in names}
    now = current.read(settings, names)
    assert {name: each.champion.version for name, each in now.items() if each.champion} == champions
