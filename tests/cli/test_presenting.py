"""`lcmlora report` and what `lcmlora serve` checks; tests/integration/test_serving.py starts its server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lcmlora.cli.main import app
from lcmlora.config import load
from lcmlora.errors import UserError
from lcmlora.io.private import downloads
from lcmlora.releases.publish import point_channel, publish_release
from tests.support import releases


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a packaged release of its model, and a store with an older one, the champion."""
    root = tmp_path / "a project"
    root.mkdir()
    monkeypatch.chdir(root)
    raw = releases.settings(root / "base", publish={"to": "store"})
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    store = load().publish
    older = releases.write_sealed(tmp_path / "older", weights=b"older")
    publish_release(older, "mini", store)
    point_channel("mini", releases.sha256_file(older / "pytorch_lora_weights.safetensors"), store)
    (releases.write_sealed(root / "release/mini") / "report.html").write_text("<p>")
    return root


def _output(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception or result.output
    return result.stdout


def _refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_report_says_where_the_page_of_each_model_is(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert _output("report") == _output("report", "mini") == "release/mini/report.html\n"
    monkeypatch.chdir(tmp_path)
    assert _output("--project", str(project), "report") == f"{project}/release/mini/report.html\n"
    assert _refusal("report").startswith("params.yaml: no such file; run in the project's folder")


def test_report_opens_the_page_in_the_browser(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{tmp_path}/opened"\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    _output("report", "mini", "--open")
    assert (tmp_path / "opened").read_text() == f"{(project / 'release/mini/report.html').as_uri()}\n"


def test_a_release_without_a_page_and_a_model_without_a_release_are_told(project: Path):
    assert _refusal("report", "mini@champion").endswith("report.html: no such file; this release has no report page")
    assert list(downloads("adapters").glob("sha256-*-all/README.md")) and not Path("scratch/adapters").exists()
    shutil.rmtree("release")
    assert _refusal("report").startswith(
        "mini: no such release; tried: no file or folder of this name; release/mini is "
    )
    Path("adapter").mkdir()
    shutil.copy("store/mini/channels/champion.json", "adapter/a.json")
    Path("adapter/pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert "has no provenance.json, so it is no release of lcmlora" in _refusal("report", "adapter")


def test_serve_checks_what_it_is_given_before_a_server_starts(project: Path):
    assert _refusal("serve", "mini", "--device", "tpu") == "--device: expected auto, cpu or cuda, got 'tpu'"
    assert _refusal("serve", "other").startswith("other: no such release; tried: ")
    assert _refusal("serve", "mini", "--base", "mini").startswith(
        "bases/mini: no such base folder; run `lcmlora fetch "
    )
    assert "lcmlora schedule" in _output("serve", "--help")
