"""What piles up in a project's folder, and what of it is deleted."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lcmlora.io.files import locked
from lcmlora.project import Project
from lcmlora.settings.services import Retention
from lcmlora.tasks import cleaning
from lcmlora.tasks.dvc import StageFailed
from lcmlora.tasks.processes import Processes
from tests.support.repositories import make

STAGES = "stages:\n  first:\n    cmd: cp source first\n    outs: [first]\n"


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def store(content: bytes, cache: Path = Path(".dvc/cache")) -> str:
    """Puts an object into a cache of DVC and returns its MD5."""
    digest = hashlib.md5(content).hexdigest()
    path = cache / "files/md5" / digest[:2] / digest[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return digest


def lock(digest: str, size: int) -> None:
    """Writes dvc.lock as after a run whose output has this MD5."""
    outs = [{"path": "first", "hash": "md5", "md5": digest, "size": size}]
    entry = {"schema": "2.0", "stages": {"first": {"cmd": "cp source first", "outs": outs}}}
    Path("dvc.lock").write_text(yaml.safe_dump(entry))


def objects(cache: Path = Path(".dvc/cache")) -> set[str]:
    return {path.parent.name + path.name for path in (cache / "files/md5").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("repository"), STAGES)


@pytest.fixture
def repository(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of all tests here, with an empty cache and DVC's default settings."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    shutil.rmtree(".dvc/cache", ignore_errors=True)
    (made / ".dvc/config").write_text("")
    return made


def test_what_neither_a_commit_nor_the_folder_names_goes_from_cache_and_remote_where_asked(
    repository: Path, tmp_path: Path
):
    remote = tmp_path / "remote"
    (repository / ".dvc/config").write_text(f"[core]\n    remote = far\n['remote \"far\"']\n    url = {remote}\n")
    committed, present, garbage = (store(content) for content in (b"committed", b"present", b"garbage, 18 bytes."))
    lock(committed, 9)
    git("add", "dvc.yaml", "dvc.lock")
    git("commit", "-qm", "first")
    lock(present, 7)
    others = store(b"of another project", remote)
    with Processes() as processes:
        (found,) = cleaning.dvc_garbage(Retention(), processes)
        assert (found.kind, found.name, found.bytes) == ("DVC's cache", "1 objects", 18)
        assert cleaning.dvc_garbage(Retention(dvc="everything"), processes) == []
        cleaning.delete_dvc_garbage(Retention(), processes)
        assert objects() == {committed, present}
        assert objects(remote) == {others}
        shared = Retention(dvc="workspace", dvc_remote=True)
        found, far = cleaning.dvc_garbage(shared, processes)
        assert (far.kind, far.name, far.bytes) == ("DVC's remote", "1 objects", 18)
        cleaning.delete_dvc_garbage(shared, processes)
    assert objects() == {present} and objects(remote) == set()
    assert garbage not in objects()


def test_a_cache_that_other_projects_may_use_is_left_alone(repository: Path, tmp_path: Path):
    others = store(b"of another project", tmp_path / "shared")
    (repository / ".dvc/config").write_text(f"[cache]\n    dir = {tmp_path / 'shared'}\n")
    with Processes() as processes:
        assert cleaning.dvc_garbage(Retention(), processes) == []
        cleaning.delete_dvc_garbage(Retention(), processes)
    assert objects(tmp_path / "shared") == {others}


def test_a_shallow_clone_deletes_nothing_for_it_does_not_know_all_commits(repository: Path, monkeypatch):
    monkeypatch.setattr(cleaning, "_git", lambda *arguments: "true")
    with Processes() as processes, pytest.raises(StageFailed, match="this clone of Git is shallow"):
        cleaning.delete_dvc_garbage(Retention(), processes)


def test_abandoned_work_and_old_logs_go_and_what_is_in_use_or_new_stays(tmp_path: Path):
    for name in ("distill/a-1", "distill/a-2", "encode/b", "teacher/a", "distill/new"):
        folder = tmp_path / "scratch" / name
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_bytes(b"x" * 100)
    (tmp_path / ".up").mkdir()
    for name in ("worker.log", "worker.log.1"):
        (tmp_path / ".up" / name).write_bytes(b"line\n")
    project, later = Project(tmp_path), time.time() + 15 * 86400
    os.utime(tmp_path / "scratch/distill/new/checkpoint.pt", (later, later))
    found = cleaning.old_files(project, Retention(), later)
    names = [Path(each.name).relative_to(tmp_path).as_posix() for each in found]
    assert names == ["scratch/distill/a-1", "scratch/distill/a-2", "scratch/encode/b", ".up/worker.log.1"]
    assert [each.bytes for each in found] == [100, 100, 100, 5]
    with locked(tmp_path / "scratch/distill/a-2"):
        assert [cleaning.delete_old_file(each) for each in found] == [True, False, True, True]
    assert (tmp_path / "scratch/distill/a-2").is_dir() and (tmp_path / ".up/worker.log").is_file()
    assert not (tmp_path / "scratch/distill/a-1").exists() and not (tmp_path / ".up/worker.log.1").exists()
    assert cleaning.old_files(project, Retention()) == []


def test_nothing_is_pruned_while_a_run_uses_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with (
        cleaning.in_use(),
        cleaning.in_use(),
        pytest.raises(cleaning.Busy, match="a run is under way in this folder"),
        cleaning.pruning(),
    ):
        pass
    with cleaning.pruning():
        pass


@pytest.mark.slow
def test_a_run_that_was_killed_does_not_keep_prune_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    script = (
        "import sys, time\nfrom lcmlora.tasks import cleaning\nwith cleaning.in_use():\n    print(1, flush=True)\n"
        "    time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert run.stdout and run.stdout.read(1) == b"1"
    with pytest.raises(cleaning.Busy), cleaning.pruning():
        pass
    run.kill()
    run.wait()
    with cleaning.pruning():
        pass
