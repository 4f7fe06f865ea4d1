"""Folders that another user cannot take: real ones of another user, where this one may make them."""

import os
import tempfile
from pathlib import Path

import pytest

from lcmlora.errors import UserError
from lcmlora.io import private


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders `run`, `home` and `shared`, of which the last is everybody's."""
    for name, mode in (("run", 0o700), ("home", 0o700), ("shared", 0o1777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    return tmp_path


def test_locks_lie_in_the_runtime_folder_of_this_user_alone(places: Path):
    folder = private.runtime_folder()
    assert folder == places / "run" / "lcmlora" == private.runtime_folder()
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", ["", "relative", "/nowhere", "open", "link", "file"])
def test_a_runtime_folder_that_is_not_this_users_alone_is_not_used(
    places: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    (places / "open").mkdir()
    (places / "open").chmod(0o777)
    (places / "link").symlink_to(places / "run")
    (places / "file").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(places / place) if (places / place).exists() and place else place)
    if Path(f"/run/user/{os.getuid()}").is_dir():
        pytest.skip("this user has a runtime folder whatever is set")
    folder = private.runtime_folder()
    assert folder.parent == places / "home/.cache/lcmlora" and folder.name.startswith("run-")


def test_a_name_that_another_took_first_in_the_shared_folder_is_refused(places: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    taken = places / "shared" / f"lcmlora-{os.getuid()}"
    assert private.cache_folder("inductor") == taken / "inductor"
    (taken / "inductor").rmdir()
    taken.rmdir()
    (places / "elsewhere").mkdir()
    taken.symlink_to(places / "elsewhere")
    with pytest.raises(UserError, match="is a link; remove it, or set XDG_RUNTIME_DIR"):
        private.cache_folder("inductor")
    taken.unlink()
    taken.mkdir()
    taken.chmod(0o777)
    with pytest.raises(UserError, match="others can write to it"):
        private.cache_folder("inductor")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(places: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    (places / "shared" / "lcmlora-0").mkdir(mode=0o700)
    os.chown(places / "shared" / "lcmlora-0", 65534, 65534)
    with pytest.raises(UserError, match="belongs to user 65534"):
        private.cache_folder("inductor")


def test_what_is_compiled_and_what_dvc_unpickles_lie_in_the_users_caches(places: Path, monkeypatch: pytest.MonkeyPatch):
    from lcmlora.tasks.processes import python

    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    environment = python("dvc").environment
    assert environment is not None and environment["DVC_SITE_CACHE_DIR"] == str(places / "home/.cache/lcmlora/dvc")
