"""A registry that others write to as well: their tags, versions and aliases break nothing of ours."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from lcmlora import registry
from lcmlora.cli.main import app
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.evaluation.figures import Metrics
from lcmlora.registry import events, promotion
from lcmlora.registry.registration import register_release
from lcmlora.tasks.models import pass_gate, read_champion
from tests.support import fuzzing, releases
from tests.support.registries import fresh

NAME = "lcm-lora-mini"
SHA = hashlib.sha256(b"weights").hexdigest()
GOOD = {"action": "promoted", "who": "ann"}

FOREIGN: dict[str, str] = {
    **{
        f"event.20261128T21000{number}.000000Z": value
        for number, value in enumerate(
            ["", "{", "null", "[]", "3", '"text"', "[" * 3000, "9" * 4900, json.dumps(["é"])],
        )
    },
    **{
        f"event.20261128T2101{number:02}.000000Z": json.dumps(value)
        for number, value in enumerate(
            [
                {},
                {"action": "promoted"},
                GOOD | {"version": 7},
                GOOD | {"time": "now"},
                GOOD | {"kwargs": {"a": 1}},
                GOOD | {"alias": 3},
                GOOD | {"alias": ["champion"]},
                GOOD | {"former": "1"},
                GOOD | {"former": True},
                GOOD | {"former": -1},
                GOOD | {"former": 10**30},
                GOOD | {"former": 1.5},
                GOOD | {"override": "yes"},
                GOOD | {"who": None},
                GOOD | {"reason": "\ud800"},
                {"action": {"deep": [[[[]]]]}, "who": "ann"},
            ]
        )
    },
    **{
        f"event.{time}": json.dumps(GOOD | {"alias": "champion"})
        for time in ("", "x", "promoted", "20261399T256199.000000Z", "20261128", "²0261128T210000.000000Z", "a" * 200)
    },
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, Path]]:
    """A registry with our version 1, champion, and versions and tags of others, in the current folder."""
    root = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        settings = fresh(root, tmp_path_factory)
        ours = register_release("mini", settings, releases.write_sealed(root / "ours", weights=b"ours"))
        promotion.promote_passed(ours, settings, reason="first")
        client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
        for name in list(FOREIGN)[-3:]:
            client.set_model_version_tag(NAME, "1", name, FOREIGN[name])
        # 2: tags like events. 3: copied our tags. 4: our digest to be. 5: what leads elsewhere. 6: a deleted run.
        client.create_model_version(NAME, "s3://elsewhere/model", tags=FOREIGN)
        client.create_model_version(NAME, "s3://elsewhere/model", tags=dict(client.get_model_version(NAME, "1").tags))
        client.create_model_version(NAME, "file:///x", run_id="no'run", tags={"sha256": SHA, "gate": "passed"})
        client.create_model_version(NAME, "file:///x", tags={"sha256": "../../../../tmp/x", "gate": "\x1b[31mred"})
        run = client.create_run("0").info.run_id
        client.create_model_version(NAME, f"runs:/{run}/model", run_id=run, tags={"sha256": SHA})
        client.delete_run(run)
        client.transition_model_version_stage(NAME, "2", "Archived")
        # A history that names versions that never were, well-formed.
        client.set_model_version_tag(
            NAME, "2", "event.20200101T000000.000000Z", json.dumps(GOOD | {"alias": "champion", "former": 99})
        )
        client.set_registered_model_alias(NAME, "theirs", "5")
        client.create_registered_model("of another team")
        client.create_model_version("of another team", "s3://x", tags={"event.x": "y", "sha256": "0" * 64})
        raw = releases.settings(root / "base", registry=settings.model_dump(), publish={"to": str(root / "store")})
        (root / "params.yaml").write_text(yaml.safe_dump(raw))
        yield settings, root


def test_events_of_others_are_counted_and_passed_over(shared: tuple[Registry, Path]):
    settings, _ = shared
    version = registry.resolve(f"{NAME}/1", settings)
    assert set(version.foreign_events) == set(list(FOREIGN)[-3:])
    assert set(registry.resolve(f"{NAME}/2", settings).foreign_events) == FOREIGN.keys()
    assert [event.action for event in events.read_events(1, version.tags)] == ["registered", "passed", "promoted"]
    told = promotion.history(NAME, settings)
    assert [event.version for event in told if event.version == 1] == [1, 1, 1]
    assert f"{NAME}/2: event.x" in promotion.foreign_events(NAME, settings)
    assert {version.name for version in registry.versions(settings)} == {NAME, "of another team"}


def test_every_command_that_looks_works_and_says_how_many_tags_it_passed_over(shared: tuple[Registry, Path]):
    runner = CliRunner()
    for arguments in (
        ["list"],
        ["list", NAME],
        ["list", "--json"],
        ["history", NAME],
        ["history", NAME, "--json"],
        *(["show", f"{NAME}/{number}"] for number in range(1, 7)),
        *(["compare", f"{NAME}/1", f"{NAME}/{number}"] for number in range(2, 7)),
        ["show", f"{NAME}@theirs", "--json"],
    ):
        result = runner.invoke(app, ["registry", *arguments])
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        assert "\x1b[31mred" not in result.output
    note = runner.invoke(app, ["registry", "history", NAME]).stderr
    assert note.startswith(f"note: {6 + len(FOREIGN)} tags that no version of lcmlora wrote: {NAME}/")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (2, "has no run, so no release; it was registered by other means"),
        (3, "has no run, so no release"),
        (4, r"has no (release|metrics\.json) among|Run with id=no'run not found"),
        (5, "has no run, so no release"),
        (6, r"has no (release|metrics\.json) among"),
    ],
)
def test_what_has_no_release_is_refused_in_a_line(shared: tuple[Registry, Path], number: int, message: str):
    settings, root = shared
    for ask in (
        lambda: registry.pull(f"{NAME}/{number}", settings, root / "out"),
        lambda: registry.figures(registry.resolve(f"{NAME}/{number}", settings), settings),
        lambda: registry.load_pipeline(f"{NAME}/{number}", settings=settings),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert not (root / "out").exists()


def test_a_digest_that_leads_elsewhere_is_refused_with_a_run_as_well(shared: tuple[Registry, Path]):
    settings, root = shared
    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    run = registry.resolve(f"{NAME}/1", settings).run_id
    made = client.create_model_version("of another team", "file:///x", run_id=run, tags={"sha256": "../../x"})
    with pytest.raises(UserError, match=r"its tag sha256 is '\.\./\.\./x', expected the SHA-256 of an adapter"):
        registry.load_pipeline(
            f"models:/of another team/{made.version}", settings=settings, cache=root / "cache" / "deep"
        )


def test_registering_promoting_and_rolling_back_go_on(shared: tuple[Registry, Path], monkeypatch: pytest.MonkeyPatch):
    settings, root = shared
    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    bundle = releases.write_sealed(root / "release" / "mini")
    made = register_release("mini", settings, bundle)
    # Two versions of others have its SHA-256 in a tag, and no release.
    assert made.created and made.version == 7
    assert (register_release("mini", settings, bundle).created, made.promoted) == (False, False)
    promotion.promote_passed(made, settings, reason="better")
    client.set_model_version_tag(
        NAME, "2", "event.20270101T000000.000000Z", json.dumps(GOOD | {"alias": "champion", "former": 98})
    )
    assert promotion.rollback(NAME, settings, reason="blurred", to=1).version == 1
    promotion.promote_passed(made, settings, reason="better")
    assert client.get_registered_model(NAME).aliases["champion"] in (7, "7")
    # Somebody makes a version of theirs champion: what follows is compared with nothing, and says so.
    client.set_registered_model_alias(NAME, "champion", "2")
    config = releases.load_settings(root / "base", registry=settings.model_dump())
    figures = Metrics.parse(releases.METRICS, "metrics.json")
    champion = read_champion.fn("mini", figures, config, None)
    assert champion and champion.fault
    assert pass_gate.fn("mini", figures, champion, config)[-1].startswith(
        f"cannot be compared with {NAME}/2, the champion: {NAME}/2: has no run"
    )
    with pytest.raises(UserError, match=rf"cannot be compared with {NAME}/2, the champion: .*--override"):
        promotion.promote(f"{NAME}/7", settings, config.gate, reason="please")
    assert promotion.promote(f"{NAME}/7", settings, config.gate, reason="ours", override=True).version == 7


def read(content: bytes) -> None:
    """What MLflow gives as a tag's value is a text; a name can be mutated as well."""
    text = content.decode("utf-8", "surrogateescape")
    tags: dict[str, Any] = {f"event.{text[:30]}": text, "event.20261128T210000.000000Z": text}
    found, foreign = events.own_and_foreign(1, tags)
    assert len(found) + len(foreign) == len(tags)
    assert set(events.champions(found, "champion")) <= {1, *(event.former for event in found)}


def fuzz(count: int) -> None:
    tag = json.dumps(GOOD | {"alias": "champion", "former": 3, "override": True, "reason": "better"}, sort_keys=True)
    examples = [tag.encode(), b"20261128T210000.000000Z" + tag.encode(), json.dumps(GOOD).encode()]
    counts = fuzzing.check(read, fuzzing.mutated(examples, count, seed=23, words=[b"former", b"alias", b"version"]))
    assert counts["taken"] == count


def test_mutated_events_are_read_or_passed_over():
    fuzz(fuzzing.QUICK)


@pytest.mark.slow
def test_many_mutated_events_are_read_or_passed_over():
    fuzz(fuzzing.FULL)
