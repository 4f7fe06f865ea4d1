"""The blocks of docs/guides that name this file, run as they stand there, page by page, in a project that has run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from docs import command_line
from lcmlora import bases, project
from lcmlora.bases import folders
from lcmlora.config import Base, Config
from lcmlora.evaluation.figures import STUDENT, Key, Metrics
from lcmlora.projects.generated import generated_files
from lcmlora.projects.record import Options
from lcmlora.registry import promotion, registration
from lcmlora.releases import publish
from lcmlora.releases.package import package_release
from tests.data.conftest import add, picture
from tests.support import code_blocks, registries, releases, repositories
from tests.support.code_blocks import ROOT, Block
from tests.support.miniature import RESOLUTION

THIS = "tests/test_guides.py"
MODELS = ("emoji", "sdxl", "my-finetune")  # as the pages call them; each is a miniature here
PAGES = sorted((ROOT / "docs/guides").glob("*.md"))


def blocks_of(page: Path) -> list[Block]:
    """Returns the blocks of a page that this test runs."""
    return [block for block in code_blocks.blocks(page) if block.claim == ("run by", (THIS,))]


@pytest.fixture(scope="module")
def finished(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which each model has a release and a champion, without a training."""
    root = tmp_path_factory.mktemp("guides") / "project"
    registry = registries.fresh(_made(root), tmp_path_factory)
    raw = releases.settings(base_folder, models=MODELS)
    for section in ("styles", "finetunes", "study"):
        raw.pop(section)
    raw["data"] = {"source": "folder", "path": "pictures", "min_side": 16}
    raw["registry"] = {"tracking_uri": "sqlite:///mlflow.db"}
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    for number in range(4):
        add(root / "pictures", f"{number}.png", f"subject {number}", picture(number))
    (root / "prompts.txt").write_text("a lighthouse\na fox\n")
    config = Config.model_validate(raw)
    for place, text in generated_files(config, Options(name="guides")).items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
    (root / "bases").mkdir()
    base = Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")
    with contextlib.chdir(root):
        for seed, model in enumerate(("emoji", *MODELS)):  # emoji twice: its champion has one before it
            shutil.rmtree(root / "adapters" / model, ignore_errors=True)
            shutil.rmtree(root / "evaluation" / model, ignore_errors=True)
            (root / "bases" / model).unlink(missing_ok=True)
            (root / "bases" / model).symlink_to(base_folder)
            loaded = bases.load(model, base, base_folder, device=torch.device("cpu"))
            releases.write_stages(loaded, root, model=model, seed=seed)
            facts = root / "adapters" / model / "config.json"  # with the digest of a real base, or it would be refused
            made_for = {"base": folders.identity(base, base_folder)}
            facts.write_text(json.dumps(json.loads(facts.read_text()) | made_for))
            package_release(model, config, project.Project(root), base_folder)
            uri = publish.publish_release(root / "release" / model, model, config.publish)
            made = registration.register_release(model, registry, root / "release" / model, uri)
            promotion.promote_passed(made, registry, reason="passed the gate")
            publish.point_channel(model, made.sha256, config.publish)
    shutil.copy(root / "release/sdxl/lcm-lora-sdxl.safetensors", root / "ink.safetensors")
    return root


def _made(root: Path) -> Path:
    return repositories.make(root, "stages: {}\n")


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, which is the current folder."""
    shutil.copytree(finished, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LCMLORA_CACHE", str(tmp_path / "cache"))
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Reader")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "reader@example.org")
    return tmp_path / "project"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, here: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
        else:
            for words in block.commands:
                _run(block, words)


def _run(block: Block, words: list[str]) -> None:
    if words[0] == "cd":
        os.chdir(words[1])
    elif words[0] == "lcmlora":
        result = CliRunner().invoke(command_line.app(), words[1:])
        assert result.exit_code == 0, f"{block}: {' '.join(words)}\n{result.output}{result.exception or ''}"
    else:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{block}: {' '.join(words)}\n{done.stdout}{done.stderr}"


def _table(page: str, title: str) -> list[list[str]]:
    """Returns the rows of the table on a page of docs/guides whose first row has this text."""
    lines = iter((ROOT / "docs/guides" / page).read_text().splitlines())
    next(line for line in lines if line.startswith("|") and title in line)
    next(lines)
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in takewhile(lambda x: x.startswith("|"), lines)]


def test_the_figures_of_the_emoji_base_are_those_of_its_evaluation() -> None:
    metrics = Metrics.read(ROOT / "metrics/emoji.json")
    student = {steps: Key.of(STUDENT, steps) for steps in (1, 2, 4, 8, 16)}
    for steps, excess, retrieval in _table("questions.md", "student's steps"):
        key = student[int(steps)]
        assert float(excess) == pytest.approx(metrics.excess[key], rel=0.005)
        assert float(retrieval) == pytest.approx(metrics.retrieval[key], abs=5e-4)
    for evaluations, solver, excess, difference in _table("measure.md", "network evaluations"):
        key = student[int(evaluations)]
        lead = metrics.advantage[key]
        assert float(excess) == pytest.approx(metrics.excess[key], rel=0.005)
        assert float(solver) == pytest.approx(metrics.excess[lead.rival], rel=0.005)
        found = [float(number) for number in re.findall(r"-?[\d.]+", difference.replace("\N{MINUS SIGN}", "-"))]
        assert found == pytest.approx([lead.difference, *(lead.interval or ())], rel=0.005)


def test_each_page_says_what_one_has_at_its_end_and_where_to_go_on() -> None:
    for page in PAGES:
        text = page.read_text()
        assert text.rstrip().splitlines()[-1].startswith("* ["), page
        assert "## Where to go on" in text, page
        assert 400 <= len(text.split()) <= 1200, f"{page}: {len(text.split())} words"
