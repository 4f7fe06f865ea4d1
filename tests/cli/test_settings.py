"""`lcmlora config`: every setting, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lcmlora.cli.main import app
from lcmlora.errors import UserError

RAW: dict[str, Any] = {
    "models": ["mine"],
    "data": {"source": "folder", "path": "in"},
    "distill": {"steps": 9},
    "bases": {"mine": {"source": "segmind/SSD-1B", "encode": {"rollouts": {"w": 4.0}}, "distill": {"rank": 8}}},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(RAW, sort_keys=False))
    return tmp_path


def told(*arguments: str) -> str:
    return CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False).stdout


def origins(*arguments: str) -> dict[str, tuple[Any, str]]:
    return {each["key"]: (each["value"], each["origin"]) for each in json.loads(told(*arguments, "--json"))}


def test_each_setting_says_where_it_comes_from(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:sesame@db/x")
    found = origins()
    lines = (project / "params.yaml").read_text().splitlines()
    line = {key: 1 + next(n for n, text in enumerate(lines) if text.strip().startswith(f"{key}:")) for key in
            ("steps", "rank", "w", "path")}  # fmt: skip
    assert found["distill.steps"] == (9, f"params.yaml:{line['steps']} distill.steps")
    assert found["distill.rank"] == (8, f"params.yaml:{line['rank']} bases.mine.distill.rank")
    assert found["encode.rollouts.w"] == (4.0, f"params.yaml:{line['w']} bases.mine.encode.rollouts.w")
    assert found["data.path"] == ("in", f"params.yaml:{line['path']} data.path")
    assert found["distill.batch"] == (8, "preset sdxl")
    assert found["bases.mine.like"] == ("sdxl", "preset ssd1b")
    assert found["bases.mine.resolution"] == (1024, "preset sdxl")
    assert found["distill.lr"] == (1e-4, "default")
    assert found["style.lr"] == (1e-4, "preset sdxl")
    assert found["registry.tracking_uri"] == ("postgresql://me:***@db/x", "MLFLOW_TRACKING_URI")


def test_one_setting_is_shown_with_its_description(project: Path):
    shown = told("distill.rank").splitlines()
    assert shown[0] == "mine:" and shown[1].split()[:2] == ["distill.rank", "8"]
    assert shown[2] == "Rank of the LoRA. Source: arXiv 2311.05556."
    assert list(origins("--model", "sd15", "encode.rollouts")) == [f"encode.rollouts.{key}" for key in
                                                                   ("steps", "w", "states")]  # fmt: skip


def test_a_setting_that_does_not_exist_is_an_error_with_those_that_are_like_it(project: Path):
    with pytest.raises(UserError, match=r"^distill\.stepz: there is no such setting; did you mean distill\.steps"):
        told("distill.stepz")
    with pytest.raises(UserError, match="unknown model 'sd99'"):
        told("--model", "sd99")


def test_schema_and_docs_need_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(told("--schema"))["required"] == ["data", "models"]
    assert told("--docs").startswith("# Configuration\n")
