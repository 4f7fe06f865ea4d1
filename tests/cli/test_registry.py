"""`lcmlora registry`, on an MLflow database and releases in a directory."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from lcmlora.cli.main import app
from lcmlora.config import load
from lcmlora.errors import UserError
from lcmlora.registry.promotion import promote_passed
from lcmlora.registry.registration import register_release
from lcmlora.releases.catalog import find_release
from lcmlora.releases.publish import point_channel, publish_release
from tests.support import releases
from tests.support.registries import fresh

NAME = "lcm-lora-mini"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two versions, the first of which is champion, and their releases in `store`."""
    monkeypatch.chdir(tmp_path)
    registry = fresh(tmp_path, tmp_path_factory).model_dump()
    raw = releases.settings(tmp_path / "base", registry=registry, publish={"to": str(tmp_path / "store")})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    settings = load()
    for weights in ("one", "two"):
        folder = releases.write_sealed(tmp_path / weights, weights=weights.encode())
        uri = publish_release(folder, "mini", settings.publish)
        registered = register_release("mini", settings.registry, folder, uri=uri)
        if weights == "one":
            promote_passed(registered, settings.registry, reason="first")
            point_channel("mini", registered.sha256, settings.publish)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["registry", *arguments])


def output_of(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.exception or result.output
    return result.stdout


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def channel(project: Path) -> str:
    return json.loads((project / "store/mini/channels/champion.json").read_text())["release"]


def test_versions_are_listed_shown_and_compared_as_tables_and_as_json():
    assert "@champion" in output_of("list") and f"{NAME}/2" in output_of("list", NAME)
    rows = json.loads(output_of("list", "--where", "gate=passed", "--where", "excess.student_4<5", "--json"))
    assert [(row["version"], row["aliases"]) for row in rows] == [(2, []), (1, ["champion"])]
    assert output_of("list", "--where", "gate=rejected", "--json") == "[]\n"
    shown = json.loads(output_of("show", f"{NAME}@champion", "--json"))
    assert (shown["version"], shown["base"]["digest"], shown["objective"]) == (1, "b" * 64, "lcm")
    assert shown["sha256"][:20] in output_of("show", f"{NAME}/1")
    compared = json.loads(output_of("compare", f"{NAME}/1", f"{NAME}/2", "--json"))
    row = next(row for row in compared["rows"] if row["figure"].endswith("/excess.student_4"))
    assert (row["first"], row["second"], row["change"]) == (4.5, 4.5, 0.0)
    assert "are the same" in output_of("compare", f"{NAME}/1", f"{NAME}/2")


def test_promoting_and_rolling_back_move_alias_and_channel_and_are_told_in_order(project: Path):
    first = channel(project)
    assert "@champion is lcm-lora-mini/2" in output_of("promote", f"{NAME}/2", "--reason", "sharper", "--by", "ada")
    assert channel(project) != first
    back = json.loads(output_of("rollback", NAME, "--reason", "blurred", "--json"))
    assert (back["version"], back["aliases"]) == (1, ["champion"])
    assert channel(project) == first == back["release_uri"]
    events = [event for event in json.loads(output_of("history", NAME, "--json")) if event["alias"]]
    assert [(e["action"], e["version"], e["former"], e["reason"]) for e in events] == [
        ("promoted", 1, None, "first"),
        ("promoted", 2, 1, "sharper"),
        ("rolled back", 1, 2, "blurred"),
    ]
    assert events[1]["who"] == "ada"
    table = output_of("history", NAME)
    assert table.index("sharper") < table.index("blurred") and "(was /2)" in table


def test_a_rejected_version_needs_override_and_override_needs_a_reason(project: Path):
    folder = releases.write_sealed(project / "three", weights=b"three")
    register_release("mini", load().registry, folder, gate_failures=["student@4: caption retrieval 0.1 is below 0.2"])
    assert "caption retrieval 0.1 is below 0.2" in refused("promote", f"{NAME}/3")
    assert "--override: needs --reason" in refused("promote", f"{NAME}/3", "--override")
    result = run("promote", f"{NAME}/3", "--override", "--reason", "agreed with design")
    assert result.exit_code == 0 and "was never published, so no channel was moved" in result.stderr
    assert "promoted against the gate" in output_of("history", NAME)


def test_a_version_is_named_by_its_model_its_adapter_and_its_release(project: Path):
    shown = json.loads(output_of("show", "mini@champion", "--json"))
    for reference in ("mini/1", shown["sha256"][:12], "one", shown["release_uri"], "models:/lcm-lora-mini/1"):
        assert json.loads(output_of("show", reference, "--json")) == shown, reference
    assert [row["version"] for row in json.loads(output_of("list", "mini", "--json"))] == [2, 1]
    assert json.loads(output_of("history", "mini", "--json")) == json.loads(output_of("history", NAME, "--json"))
    assert f"{NAME}@champion is {NAME}/2" in output_of("promote", "two", "--reason", "sharper")
    assert json.loads(output_of("rollback", "mini", "--reason", "blurred", "--json"))["version"] == 1
    unregistered = releases.write_sealed(project / "three", weights=b"three")
    assert refused("show", str(unregistered)).startswith(f"{unregistered}: ")


def test_outside_a_project_the_environment_names_the_registry(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert refused("list").startswith("there is no registry: set MLFLOW_TRACKING_URI, or run in a project's folder")
    assert "there is no registry: set MLFLOW_TRACKING_URI" in refused("show", "mini@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    assert "@champion" in output_of("list") and "promoted" in output_of("history", "mini")
    assert f"{NAME}/1" in output_of("show", "mini@champion")
    assert "are the same" in output_of("compare", "mini/1", "mini/2")
    assert list(elsewhere.iterdir()) == []


def test_an_adapter_is_pulled_and_checked():
    answer = json.loads(output_of("pull", f"{NAME}/1", "--out", "here", "--json"))
    assert Path("here/pytorch_lora_weights.safetensors").read_bytes() == b"one"
    assert answer["sha256"] == json.loads(output_of("show", f"{NAME}/1", "--json"))["sha256"]
    assert "here: exists" in refused("pull", f"{NAME}/2", "--out", "here")


@pytest.mark.parametrize("verb", ["list", "show", "compare", "history", "promote", "rollback", "pull"])
def test_every_verb_has_an_example_in_its_help(verb: str):
    assert f"lcmlora registry {verb}" in output_of(verb, "--help")


def test_promoting_the_champion_again_signs_the_pointer_of_an_older_version(project: Path):
    pytest.importorskip("model_signing", reason="no model-signing (extra `signing`) here")
    from tests.releases.test_signing import write_keys

    private, public = write_keys(project, "ours")
    raw = yaml.safe_load((project / "params.yaml").read_text())
    raw["publish"] |= {"signing_key": private}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    publish_release(project / "one", "mini", load().publish)  # which stands, and is signed now
    raw["publish"] |= {"verify_key": public}
    (project / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=rf"is not signed.*run `lcmlora registry promote {NAME}@champion`"):
        find_release("mini@champion", load().publish)
    assert f"{NAME}@champion is {NAME}/1" in output_of("promote", f"{NAME}@champion")
    assert find_release("mini@champion", load().publish)[0] == channel(project)


@pytest.mark.parametrize("verb", ["approve", "reject", "registry promote"])
def test_a_decision_names_a_version(verb: str):
    result = CliRunner().invoke(app, [*verb.split(), "mini", "--reason", "sharp"])
    assert str(result.exception) == "mini: is the name of a model; say which version of it, such as mini/3"
