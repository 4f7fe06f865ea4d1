import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA

from lcmlora.tasks.leftovers import repair
from tests.support.repositories import make

STAGES = """
stages:
  first:
    cmd: cp source first
    deps: [source]
    outs: [first]
  second:
    cmd: cp first second
    deps: [first]
    outs: [second]
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make(tmp_path / "repository", STAGES)
    (root / "source").write_text("1\n")
    monkeypatch.chdir(root)
    return root


def dvc(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True, text=True).stdout


def test_a_lock_file_that_was_cut_off_anywhere_is_one_that_dvc_reads_again(repository: Path):
    dvc("repro")
    repair()
    whole = Path("dvc.lock").read_text()
    restored = 0
    for length in range(0, len(whole), 3):
        Path("dvc.lock").write_text(whole[:length])
        repair()
        text = Path("dvc.lock").read_text()
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(text))
        restored += text == whole
        Path("dvc.lock").write_text(whole)
        repair()
    assert restored > len(whole) / 9  # the others end between two entries, or within a name or a number
    Path("dvc.lock").write_text(whole[: whole.index("first:") + 2])
    repair()
    assert dvc("status").strip() == "Data and pipelines are up to date."


def test_without_a_copy_the_lock_file_goes_and_the_run_cache_gives_the_stages_back(repository: Path):
    dvc("repro")
    Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  first:\n    cmd:")
    repair()
    assert not Path("dvc.lock").exists()
    assert "Stage 'first' is cached" in dvc("repro")


def test_of_the_readers_and_writers_those_who_are_no_dvc_are_forgotten(repository: Path):
    table = Path(".dvc/tmp/rwlock")
    other = {"pid": os.getppid(), "cmd": "dvc repro"}  # a number that another program was given
    table.write_text(json.dumps({"write": {str(repository / "first"): other}, "read": {"x": [other]}}))
    repair()
    assert json.loads(table.read_text()) == {"write": {}, "read": {}}
    dvc("repro", "first")


def test_a_table_of_readers_and_writers_that_was_cut_off_becomes_empty(repository: Path):
    table = Path(".dvc/tmp/rwlock")
    table.write_text('{"write": {"a": {"pid": 1')
    repair()
    assert json.loads(table.read_text()) == {}
    dvc("repro", "first")
