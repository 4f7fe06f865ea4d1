"""What is made on a Prefect server, and of which project it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from lcmlora.dvc_files import commits
from lcmlora.errors import UserError
from lcmlora.flows import provision
from lcmlora.tasks.output import slug
from tests.flows.conftest import LIMIT


def described(pool: str) -> str | None:
    with get_client(sync_client=True) as client:
        return client.read_work_pool(pool).description


def test_a_pool_says_of_which_project_it_is_and_refuses_another_of_the_same_name(
    prefect: None, request: pytest.FixtureRequest
):
    pool, first, other = slug(request.node.name)[:60], "a" * 40, "b" * 40
    provision.provide(LIMIT, pool=pool, project=first)
    assert first in (described(pool) or "")
    provision.provide(LIMIT, pool=pool, project=first)  # another clone of it
    provision.provide(LIMIT, pool=pool)  # a clone that does not know its first commit
    with pytest.raises(UserError, match=f"work pool {pool}: belongs to another project.*{'a' * 12}.*{'b' * 12}"):
        provision.provide(LIMIT, pool=pool, project=other)
    assert other not in (described(pool) or "")


def test_a_pool_that_a_person_has_made_keeps_its_description(prefect: None, request: pytest.FixtureRequest):
    from prefect.client.schemas.actions import WorkPoolCreate

    pool = slug(request.node.name)[:60]
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process", description="of the third floor"))
    provision.provide(LIMIT, pool=pool, project="a" * 40)
    assert (described(pool) or "").splitlines() == ["of the third floor", "project whose first commit is " + "a" * 40]


def test_all_clones_of_a_project_have_its_first_commit(tmp_path: Path):
    def git(*arguments: str, folder: Path = tmp_path / "one") -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    (tmp_path / "one").mkdir()
    assert commits.first_of_project(tmp_path / "one") is None
    git("init")
    assert commits.first_of_project(tmp_path / "one") is None
    git("commit", "--allow-empty", "-m", "first")
    first = commits.first_of_project(tmp_path / "one")
    git("commit", "--allow-empty", "-m", "second")
    git("clone", str(tmp_path / "one"), "two", folder=tmp_path)
    assert first is not None and commits.first_of_project(tmp_path / "two") == first
    git("clone", "--depth", "1", f"file://{tmp_path / 'one'}", "three", folder=tmp_path)
    assert commits.first_of_project(tmp_path / "three") is None
