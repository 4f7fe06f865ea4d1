"""`lcmlora prune` and its flow: lists, deletes, and goes on after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lcmlora import registry
from lcmlora.config import load
from lcmlora.flows.prune import prune_project
from lcmlora.registry import promotion, registration
from lcmlora.releases import catalog, publish
from lcmlora.tasks import cleaning
from tests.flows.conftest import Project, artifacts
from tests.support.releases import write_sealed

ROOT = Path(__file__).parents[2]


def fill(project: Project, count: int) -> None:
    """Registers and publishes versions of model `a`; the last one is champion, the one before it previous."""
    settings = load()
    for number in range(count):
        folder = write_sealed(project.root / "made" / str(number), weights=f"{number}".encode(), model="a")
        uri = publish.publish_release(folder, "a", settings.publish)
        made = registration.register_release("a", settings.registry, folder, uri)
        if number >= count - 2:
            promotion.promote_passed(made, settings.registry, reason="passed")
            publish.point_channel("a", made.sha256, settings.publish)


def check_names(project: Project) -> None:
    """Each alias and each channel names something whole."""
    settings = load()
    for alias in project.aliases("a"):
        registry.pull(f"a@{alias}", settings.registry, everything=True)
    for pointer in (project.root / "releases/a/channels").glob("*.json"):
        catalog.verify_release(f"a@{pointer.stem}", settings.publish)


def keep_little(project: Project) -> None:
    project.change(lambda raw: raw.update(retention={"versions": 1, "days": 0}))


def test_a_dry_run_lists_with_bytes_and_a_real_one_deletes_just_that(project: Project):
    keep_little(project)
    fill(project, 3)
    garbage = project.root / ".dvc/cache/files/md5/00" / ("0" * 30)
    garbage.parent.mkdir(parents=True)
    garbage.write_bytes(b"12345")
    state = prune_project(return_state=True)
    assert state.name == "Listed"
    assert state.message.startswith("version: 1, ") and "release: 1, " in state.message
    rows = json.loads(artifacts("prune")[-1].data)
    assert [(row["what"], row["which"].rpartition("/")[2][:7]) for row in rows] == [
        ("version", "1"),
        ("release", "sha256-"),
        ("DVC's cache", "1 objects"[:7]),
    ]
    assert rows[2]["bytes"] == "5 bytes"
    assert len(project.versions("a")) == len(project.releases()) == 3 and garbage.exists()
    with cleaning.in_use():
        assert prune_project(dry_run=False, return_state=True).name == "Postponed"
    assert len(project.versions("a")) == 3
    state = prune_project(dry_run=False, return_state=True)
    assert state.name == "Pruned", state.message
    assert len(project.versions("a")) == len(project.releases()) == 2 and not garbage.exists()
    check_names(project)
    assert prune_project(dry_run=False, return_state=True).name == "NothingToPrune"


def command(project: Project) -> subprocess.Popen[Any]:
    line = [sys.executable, "-m", "flows.prune", "--yes", "--by", "ada"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, cwd=project.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_prune_that_is_killed_at_any_moment_leaves_no_dangling_name_and_the_next_one_finishes(project: Project):
    keep_little(project)
    fill(project, 25)
    chance = random.Random(26)
    kills = 0
    for _ in range(60):
        before = {*(project.root / "releases").rglob("*")}
        process = command(project)
        while process.poll() is None and {*(project.root / "releases").rglob("*")} == before:
            time.sleep(0.01)
        time.sleep(chance.random() / 3)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()
        check_names(project)
        if process.returncode == 0:
            break
    assert kills > 3
    process = command(project)
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert [int(version.version) for version in project.versions("a")] == [24, 25]
    assert len(project.releases()) == 2
    assert not list((project.root / "releases").rglob("pruned.json"))
    stones = project.mlflow().get_registered_model("lcm-lora-a").tags
    pruned = [json.loads(value) for key, value in stones.items() if key.startswith("pruned.")]
    assert len(pruned) == 23 and all(stone["finished"] and stone["who"] == "ada" for stone in pruned)
    check_names(project)
