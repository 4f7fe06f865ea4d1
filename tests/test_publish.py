import hashlib
import json
from pathlib import Path

import pytest

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.publish import point, publish
from tests.releases import write_sealed

SHA = hashlib.sha256(b"weights").hexdigest()


def state(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def settings(tmp_path: Path) -> Publish:
    return Publish(to=str(tmp_path / "releases"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_sealed(tmp_path / "bundle")


def test_a_release_is_published_whole_with_a_manifest_of_its_files(settings: Publish, bundle: Path):
    uri = publish(bundle, "mini", settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    assert uri == folder.as_uri()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == SHA
    assert len(manifest["files"]) == 7
    for file in manifest["files"]:
        content = (folder / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        assert content == (bundle / file["name"]).read_bytes()
    assert len(list(folder.iterdir())) == 8


def test_publishing_again_writes_nothing_and_gives_the_same_address(settings: Publish, bundle: Path):
    first = publish(bundle, "mini", settings)
    before = state(Path(settings.to))
    assert publish(bundle, "mini", settings) == first
    assert state(Path(settings.to)) == before


def test_the_same_adapter_packaged_anew_is_the_release_that_stands(settings: Publish, bundle: Path, tmp_path: Path):
    first = publish(bundle, "mini", settings)
    before = state(Path(settings.to))
    again = write_sealed(tmp_path / "again", card="other figures\n")
    assert publish(again, "mini", settings) == first
    assert state(Path(settings.to)) == before


def test_a_release_without_manifest_is_completed_by_the_next_run(settings: Publish, bundle: Path):
    uri = publish(bundle, "mini", settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    (folder / "manifest.json").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json, so no release"):
        point("mini", SHA, settings)
    kept = state(folder)
    assert publish(bundle, "mini", settings) == uri
    assert (folder / "manifest.json").is_file()
    assert (folder / "README.md").read_text() == "card\n"
    assert {name: stamp for name, stamp in state(folder).items() if name in kept} == kept


def test_different_files_under_a_half_published_prefix_are_refused(settings: Publish, bundle: Path, tmp_path: Path):
    publish(bundle, "mini", settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    (folder / "manifest.json").unlink()
    other = write_sealed(tmp_path / "other", card="another publisher's\n")
    with pytest.raises(UserError, match=r"README\.md: holds sha256 .* delete the prefix mini/sha256-"):
        publish(other, "mini", settings)
    assert not (folder / "manifest.json").exists()
    assert (folder / "README.md").read_text() == "card\n"


def test_a_damaged_bundle_is_not_published(settings: Publish, bundle: Path):
    (bundle / "grid.png").write_bytes(b"pnG")
    with pytest.raises(UserError, match=r"grid\.png: expected sha256"):
        publish(bundle, "mini", settings)
    assert not Path(settings.to).exists()


def test_the_channel_points_at_the_release_that_was_named_last(settings: Publish, bundle: Path, tmp_path: Path):
    other = write_sealed(tmp_path / "other", weights=b"better")
    publish(bundle, "mini", settings)
    uri = publish(other, "mini", settings)
    pointer = Path(settings.to) / "mini/channels/champion.json"
    assert point("mini", SHA, settings) == pointer.as_uri()
    assert json.loads(pointer.read_text())["sha256"] == SHA
    point("mini", hashlib.sha256(b"better").hexdigest(), settings)
    assert json.loads(pointer.read_text())["release"] == uri
    before = state(Path(settings.to))
    point("mini", hashlib.sha256(b"better").hexdigest(), settings)
    assert state(Path(settings.to)) == before


def test_a_directory_that_cannot_be_written_is_named(bundle: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"publish\.to: cannot use .*/file/.*: Not a directory; the release is kept"):
        publish(bundle, "mini", Publish(to=str(tmp_path / "file")))


@pytest.mark.parametrize("to", ["s3://", "gs://bucket/prefix"])
def test_an_address_that_is_neither_directory_nor_bucket_is_refused(to: str, bundle: Path):
    with pytest.raises(UserError, match=r"publish\.to: expected .* got '"):
        publish(bundle, "mini", Publish(to=to))
