"""`lcmlora releases`, on releases in a directory."""

import getpass
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from lcmlora.cli.releases import app
from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.registry.registration import register_release
from lcmlora.releases.publish import point_channel, publish_release
from tests.support.registries import fresh
from tests.support.releases import settings as params
from tests.support.releases import write_sealed

SHA = hashlib.sha256(b"weights").hexdigest()
NAME = f"mini/sha256-{SHA[:12]}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the champion and a half release, beside an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = Publish(to=str(tmp_path / "store"))
    publish_release(write_sealed(tmp_path / "bundle"), "mini", settings)
    publish_release(write_sealed(tmp_path / "half", weights=b"half"), "mini", settings)
    half = hashlib.sha256(b"half").hexdigest()[:12]
    (tmp_path / "store" / "mini" / f"sha256-{half}" / "manifest.json").unlink()
    point_channel("mini", SHA, settings)
    return tmp_path / "store"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def output_of(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.exception or result.output
    return result.stdout


def refusal_of(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, UserError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_the_list_says_size_channel_and_what_is_not_complete(store: Path):
    text = output_of("list", "--to", store)
    assert "champion" in text and "not complete: no manifest.json" in text
    rows = json.loads(output_of("list", "mini", "--to", store, "--json"))
    assert {(row["sha256"], row["whole"], row["files"]) for row in rows} == {
        (SHA, True, 8),
        (hashlib.sha256(b"half").hexdigest()[:12], False, 7),
    }
    assert json.loads(output_of("list", "nobody", "--to", store, "--json")) == []
    assert output_of("list", "--to", store.parent / "here") == f"no releases at {store.parent / 'here'}\n"


def test_params_yaml_says_where_releases_are_and_to_goes_before_it(store: Path, tmp_path: Path):
    import yaml

    assert refusal_of("list").startswith("--to: is needed, as there is no params.yaml here")
    raw = params(tmp_path / "base", publish={"to": str(store)})
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    assert len(json.loads(output_of("list", "--json"))) == 2
    assert json.loads(output_of("verify", "mini@champion", "--json"))["sha256"] == SHA
    assert json.loads(output_of("list", "--json", "--to", tmp_path / "bundle")) == []
    assert refusal_of("verify", "mini@champion", "--to", "gs://b").startswith("--to: expected a directory or s3://")


def test_verifying_says_what_was_read_and_that_it_is_not_signed(store: Path):
    text = output_of("verify", "mini@champion", "--to", store)
    assert f"{NAME}: 8 files" in text and SHA in text and "not signed" in text
    found = json.loads(output_of("verify", store / NAME, "--json"))
    assert (found["sha256"], found["files"], found["signature"]) == (SHA, 8, "none")
    (store / NAME / "pytorch_lora_weights.safetensors").write_bytes(b"wEights")
    assert f"pytorch_lora_weights.safetensors: expected sha256 {SHA[:12]}..., got" in refusal_of("verify", store / NAME)


def test_pulling_gives_the_adapter_or_all_of_it(store: Path, tmp_path: Path):
    text = output_of("pull", "mini@champion", "--to", store, "--out", tmp_path / "a")
    assert text == f"{tmp_path / 'a'}: adapter {SHA}, 4 files\n"
    assert (tmp_path / "a" / "pytorch_lora_weights.safetensors").read_bytes() == b"weights"
    found = json.loads(output_of("pull", NAME, "--to", store, "--out", tmp_path / "b", "--all", "--json"))
    assert found["sha256"] == SHA and len(found["files"]) == 7
    assert "neither an empty folder" in refusal_of("pull", NAME, "--to", store, "--out", tmp_path / "bundle" / "..")


def test_yanking_is_written_down_and_pulling_then_needs_to_be_asked_for(store: Path, tmp_path: Path):
    other = publish_release(write_sealed(tmp_path / "other", weights=b"other"), "mini", Publish(to=str(store)))
    assert "champion points to it" in refusal_of("yank", "mini@champion", "--to", store, "--reason", "x")
    assert output_of("yank", other, "--reason", "six fingers") == f"{other}/yanked.json\n"
    record = json.loads((store / other.partition("/store/")[2] / "yanked.json").read_text())
    assert (record["reason"], record["who"]) == ("six fingers", getpass.getuser())
    assert "six fingers; take another release" in refusal_of("pull", other, "--out", tmp_path / "a")
    assert "6 files" not in output_of("pull", other, "--out", tmp_path / "a", "--yanked")
    assert "yanked by" in output_of("list", "--to", store)
    assert "six fingers" in output_of("verify", other)


def test_a_release_is_named_by_its_adapter_and_by_its_version(
    store: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    to = ("--to", str(store), "--json")
    for reference in (SHA, SHA[:12], tmp_path / "bundle", tmp_path / "bundle/pytorch_lora_weights.safetensors"):
        assert json.loads(output_of("verify", reference, *to))["sha256"] == SHA
    assert "no such adapter; tried: " in refusal_of("verify", "mini/1", *to[:2])
    registry = fresh(tmp_path, tmp_path_factory)
    settings = Publish(to=str(store))
    register_release("mini", registry, tmp_path / "bundle", publish_release(tmp_path / "bundle", "mini", settings))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    assert json.loads(output_of("verify", "mini/1", "--json"))["sha256"] == SHA
    monkeypatch.setenv("LCMLORA_PUBLISH_TO", str(store))
    assert json.loads(output_of("verify", "mini@champion", "--json"))["sha256"] == SHA


def test_links_of_a_directory_are_refused(store: Path):
    assert "a directory gives no links" in refusal_of("links", store / NAME, "--expires", 60)


def test_every_verb_has_an_example_and_help_imports_nothing_heavy():
    for verb in ("list", "verify", "pull", "yank", "links"):
        assert re.search(rf"Examples?:\s+lcmlora releases {verb} ?", output_of(verb, "--help"))
    heavy = ("torch", "diffusers", "mlflow", "boto3", "pydantic", "rich.table")
    probe = f"import sys, lcmlora.cli.releases; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"
