"""Links in a folder, its unused files, and DVC's own cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcmlora.data.prepare import prepare_pictures
from lcmlora.data.reading.candidates import LINKED, MISSING, NO_FILE
from lcmlora.data.reading.folder_listing import LinkRule, list_folder
from lcmlora.data.sources.source import survey
from lcmlora.errors import UserError
from tests.data.conftest import add, data_in, picture
from tests.data.test_bulk_sources import sample, table, tar

BLOB = f"files/md5/ab/{'0' * 30}"


def put(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(root: Path, rule: str = "refuse") -> list[str]:
    return list_folder(LinkRule(root, rule)).names


def test_links_within_the_folder_are_read_and_out_of_it_are_told(tmp_path: Path) -> None:
    root = tmp_path / "in"
    put(root / "real/a.png")
    put(tmp_path / "out/b.png")
    (root / "a.png").symlink_to(root / "real/a.png")
    (root / "more").symlink_to(tmp_path / "out")
    (root / "b.png").symlink_to(tmp_path / "out/b.png")
    listing = list_folder(LinkRule(root, "refuse"))
    assert listing.names == ["a.png", "real/a.png"]
    assert listing.refused == {"more/": LINKED, "b.png": LINKED}
    assert names(root, "follow") == ["a.png", "b.png", "more/b.png", "real/a.png"]


def test_a_folder_is_read_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    root = tmp_path / "in"
    put(root / "b/a.png")
    put(tmp_path / "out/c.png")
    (root / "again").symlink_to(root / "b")
    (root / "b/up").symlink_to(root)
    (root / "b/self").symlink_to("self")
    (root / "one").symlink_to(tmp_path / "out")
    (root / "two").symlink_to(tmp_path / "out")
    (tmp_path / "out/back").symlink_to(root)
    listing = list_folder(LinkRule(root, "follow"))
    assert listing.names == ["b/a.png", "one/c.png"]
    assert listing.repeated == ["again/", "two/", "b/up/", "one/back/"]
    assert listing.refused == {"b/self": MISSING}


def test_pipes_broken_links_and_hidden_files_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / ".git/config")
    put(tmp_path / "._a.png")
    os.mkfifo(tmp_path / "metadata.jsonl")
    (tmp_path / "device.png").symlink_to("/dev/null")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_folder(LinkRule(tmp_path, "follow"))
    assert listing.names == ["a.png"]
    assert listing.hidden == ["._a.png", ".git"]
    assert listing.refused == {"metadata.jsonl": NO_FILE, "device.png": NO_FILE, "gone.png": MISSING}


def test_dvcs_cache_of_the_same_repository_counts_as_part_of_the_folder(tmp_path: Path) -> None:
    other = tmp_path / "other" / ".dvc" / "cache"
    put(tmp_path / ".dvc/config")
    (root := tmp_path / "in").mkdir()
    (root / "a.png").symlink_to(put(tmp_path / ".dvc/cache" / BLOB))
    (root / "b.png").symlink_to(put(other / BLOB))
    assert names(root) == ["a.png"]


@pytest.mark.parametrize("file", ["config", "config.local"])
@pytest.mark.parametrize("relative", [True, False])
def test_dvcs_cache_elsewhere_is_found_by_its_settings_and_only_blobs_of_it_are_read(
    tmp_path: Path, file: str, relative: bool
) -> None:
    root = tmp_path / "repository/in"
    root.mkdir(parents=True)
    place = "../../cache" if relative else str(tmp_path / "cache")
    put(
        tmp_path / "repository/.dvc" / file,
        f"[core]\n    remote = x\n['remote \"x\"']\n    url = y\n[cache]\n    dir = {place}\n",
    )
    (root / "a.png").symlink_to(put(tmp_path / "cache" / BLOB))
    (root / "old.png").symlink_to(put(tmp_path / "cache/ab" / ("1" * 30)))
    (root / "secret.png").symlink_to(put(tmp_path / "cache/secret.png"))
    assert names(root) == ["a.png", "old.png"]


def test_settings_that_lie_in_the_data_folder_itself_are_not_believed(tmp_path: Path) -> None:
    root = tmp_path / "in"
    put(root / ".dvc/config", f"[cache]\ndir = {tmp_path / 'home'}\n")
    (root / "a.png").symlink_to(put(tmp_path / "home" / BLOB))
    assert names(root) == []


def test_git_annex_links_to_its_objects(tmp_path: Path) -> None:
    (tmp_path / "set/in").mkdir(parents=True)
    (tmp_path / "set/in/a.png").symlink_to(put(tmp_path / "set/.git/annex/objects/x/y/a.png"))
    (tmp_path / "set/in/b.png").symlink_to(put(tmp_path / "set/.git/config"))
    assert names(tmp_path / "set/in") == ["a.png"]


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    hub = tmp_path / "datasets--me--set"
    snapshot = hub / "snapshots/0123"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data/a.parquet").symlink_to(Path("../../../blobs") / put(hub / "blobs/77").name)
    (snapshot / "b.parquet").symlink_to(put(tmp_path / "datasets--you--set/blobs/77"))
    assert names(snapshot) == ["data/a.parquet"]


def test_links_may_lead_anywhere_in_the_project_of_the_data_but_to_what_is_hidden(tmp_path: Path) -> None:
    root = tmp_path / "project/in"
    root.mkdir(parents=True)
    (root / "a.png").symlink_to(put(tmp_path / "project/store/a.png"))
    (root / "env.txt").symlink_to(put(tmp_path / "project/.env"))
    (root / "out.png").symlink_to(put(tmp_path / "out.png"))
    assert names(root, "project") == []  # it is no project
    put(tmp_path / "project/params.yaml")
    assert names(root, "project") == ["a.png"]
    assert names(root, "refuse") == []
    put(root / "params.yaml")  # which came with the data
    assert names(root, "project") == ["params.yaml"]


def test_the_rule_is_one_for_pictures_tables_and_tar_files(tmp_path: Path) -> None:
    tar(tmp_path / "store/a.tar", *(m for number in range(4) for m in sample(number)))
    add(tmp_path / "store/pictures", "a.png", "a caption", picture(0))
    table(tmp_path / "store/a.parquet", image=[(tmp_path / "store/pictures/a.png").read_bytes()], text=["t"])
    kinds = {"webdataset": "a.tar", "parquet": "a.parquet", "folder": "pictures"}
    for kind, name in kinds.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "store" / name)
        followed = survey(data_in(folder, source=kind, links="follow"))
        assert followed.records and not followed.rejections, kind
        with pytest.raises(UserError, match=r"1 link that leads out.*data\.links: follow") as error:
            prepare_pictures(data_in(folder, source=kind, links="refuse"), 1, tmp_path / "out")
        assert name in str(error.value)


@pytest.mark.slow
def test_what_dvc_itself_links_is_read(folder: Path) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    for command in ("init -q --no-scm", "config cache.type symlink", "add -q in"):
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], cwd=folder.parent, env=environment, check=True)
    assert (folder / "0.png").is_symlink()
    found = survey(data_in(folder, links="refuse"))
    assert len(found.records) == 8 and not found.rejections
