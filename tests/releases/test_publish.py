import hashlib
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.registry import references
from lcmlora.releases import catalog
from lcmlora.releases.bundle import ADAPTER_FILES, verify
from lcmlora.releases.catalog import download_release, find_release, list_releases, presigned_links, pull_release
from lcmlora.releases.publish import (
    point_channel,
    point_channel_of,
    point_channels_of,
    publish_release,
    yank_release,
)
from lcmlora.releases.stores.directory import DirectoryStore
from tests.support.releases import write_sealed
from tests.support.together import at_once

SHA = hashlib.sha256(b"weights").hexdigest()
ADAPTER_ONLY = {"pytorch_lora_weights.safetensors", "scheduler_config.json", "provenance.json", "SHA256SUMS"}


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
    uri = publish_release(bundle, "mini", settings)
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
    first = publish_release(bundle, "mini", settings)
    before = state(Path(settings.to))
    assert publish_release(bundle, "mini", settings) == first
    assert state(Path(settings.to)) == before


def test_the_same_adapter_packaged_anew_is_the_release_that_stands(settings: Publish, bundle: Path, tmp_path: Path):
    first = publish_release(bundle, "mini", settings)
    before = state(Path(settings.to))
    again = write_sealed(tmp_path / "again", card="other figures\n")
    assert publish_release(again, "mini", settings) == first
    assert state(Path(settings.to)) == before


def test_a_release_without_manifest_is_completed_by_the_next_run(settings: Publish, bundle: Path):
    uri = publish_release(bundle, "mini", settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    (folder / "manifest.json").unlink()
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json, so no release"):
        point_channel("mini", SHA, settings)
    kept = state(folder)
    assert publish_release(bundle, "mini", settings) == uri
    assert (folder / "manifest.json").is_file()
    assert (folder / "README.md").read_text() == "card\n"
    assert {name: stamp for name, stamp in state(folder).items() if name in kept} == kept


def test_different_files_under_a_half_published_prefix_are_refused(settings: Publish, bundle: Path, tmp_path: Path):
    publish_release(bundle, "mini", settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    (folder / "manifest.json").unlink()
    other = write_sealed(tmp_path / "other", card="another publisher's\n")
    with pytest.raises(UserError, match=r"SHA256SUMS: holds sha256 .* expected .* delete the prefix mini/sha256-"):
        publish_release(other, "mini", settings)
    assert not (folder / "manifest.json").exists()
    assert (folder / "README.md").read_text() == "card\n"


def test_a_damaged_bundle_is_not_published(settings: Publish, bundle: Path):
    (bundle / "grid.png").write_bytes(b"pnG")
    with pytest.raises(UserError, match=r"grid\.png: expected sha256"):
        publish_release(bundle, "mini", settings)
    assert not Path(settings.to).exists()


def test_the_channel_points_at_the_release_that_was_named_last(settings: Publish, bundle: Path, tmp_path: Path):
    other = write_sealed(tmp_path / "other", weights=b"better")
    publish_release(bundle, "mini", settings)
    uri = publish_release(other, "mini", settings)
    pointer = Path(settings.to) / "mini/channels/champion.json"
    assert point_channel("mini", SHA, settings) == pointer.as_uri()
    assert json.loads(pointer.read_text())["sha256"] == SHA
    point_channel("mini", hashlib.sha256(b"better").hexdigest(), settings)
    assert json.loads(pointer.read_text())["release"] == uri
    before = state(Path(settings.to))
    point_channel("mini", hashlib.sha256(b"better").hexdigest(), settings)
    assert state(Path(settings.to)) == before


def test_a_channel_moves_in_every_store_that_can_be_reached_and_the_others_are_named(bundle: Path, tmp_path: Path):
    settings = Publish(to=[str(tmp_path / name) for name in ("first", "second", "third")])
    uris = [publish_release(bundle, "mini", settings.to_one(store)) for store in settings.stores]
    assert publish_release(bundle, "mini", settings) == uris[0]
    (tmp_path / "second/mini/channels").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot use .*/second/.*; it was moved at .*/first/.*, .*/third/") as caught:
        point_channels_of("mini", SHA, uris, settings)
    assert "\n" not in str(caught.value)
    (tmp_path / "second/mini/channels").unlink()
    moved = point_channels_of("mini", SHA, uris, settings)
    assert moved == [
        (tmp_path / name / "mini/channels/champion.json").as_uri() for name in ("first", "second", "third")
    ]
    assert find_release("mini@champion", settings) == (uris[0], SHA)


def test_stores_are_several_by_a_list_or_by_addresses_with_spaces_and_none_twice():
    assert Publish(to="s3://a hf://b/c").stores == ["s3://a", "hf://b/c"] == Publish(to=["s3://a", "hf://b/c"]).stores
    assert Publish(to="my owls").stores == ["my owls"]
    assert Publish(to=["a/{model}", "b"]).of("mini").stores == ["a/mini", "b"]
    assert Publish(to="hf://o/{model}").of("mini").to == "hf://o/mini"
    for wrong in ([], ["a", "a"]):
        with pytest.raises(ValueError, match=r"at least 1 item|names a store more than once"):
            Publish(to=wrong)


@pytest.mark.parametrize("folder", ["my owls", "50% owls", "owls#2?", "eulen-übung"])
def test_a_channel_follows_in_a_directory_whose_name_is_quoted_in_addresses(folder: str, bundle: Path, tmp_path: Path):
    settings = Publish(to=str(tmp_path / folder))
    uri = publish_release(bundle, "mini", settings)
    pointer = tmp_path / folder / "mini/channels/champion.json"
    assert point_channel_of("mini", SHA, uri, Publish(to=str(tmp_path / "another"))) == pointer.as_uri()
    for name in ("mini@champion", uri, str(pointer)):
        assert find_release(name, settings) == (uri, SHA)


def test_a_directory_that_cannot_be_written_is_named(bundle: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"publish\.to: cannot use .*/file/.*: Not a directory; the release is kept"):
        publish_release(bundle, "mini", Publish(to=str(tmp_path / "file")))


@pytest.mark.parametrize("to", ["s3://", "gs://bucket/prefix"])
def test_an_address_that_is_neither_directory_nor_bucket_is_refused(to: str, bundle: Path):
    with pytest.raises(UserError, match=r"publish\.to: expected .* got '"):
        publish_release(bundle, "mini", Publish(to=to))


def test_what_a_dead_publisher_left_is_listed_and_no_release_for_readers(settings: Publish, bundle: Path):
    uri = publish_release(bundle, "mini", settings)
    (Path(settings.to) / "mini" / f"sha256-{SHA[:12]}" / "manifest.json").unlink()
    (row,) = list_releases(settings)
    assert (row.whole, row.sha256, row.files) == (False, SHA[:12], 7)
    for name in (uri, f"mini/sha256-{SHA[:12]}", str(Path(settings.to) / "mini" / f"sha256-{SHA[:12]}")):
        with pytest.raises(UserError, match=r"holds no manifest\.json, so no release|no such release at"):
            find_release(name, settings)


def test_a_release_is_found_by_channel_digits_address_and_path(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)
    publish_release(write_sealed(tmp_path / "other", weights=b"better"), "mini", settings)
    pointer = point_channel("mini", SHA, settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    below = ("mini@champion", f"mini/sha256-{SHA[:5]}", f"mini/sha256-{SHA[:12]}", f"mini/sha256-{SHA}")
    anywhere = (uri, pointer, str(folder), f"{folder}/", str(Path(settings.to) / "mini/channels/champion.json"))
    for name in below:
        assert find_release(name, settings) == (uri, SHA)
    for name in anywhere:
        assert find_release(name, Publish(to="nowhere")) == (uri, SHA)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mini@nobody", r"mini/channels/nobody\.json: no such pointer"),
        (f"mini/sha256-{SHA[:12]}{'0' * 52}", r"no such release at file://.*releases list"),
        ("mini/sha256-", r"holds no manifest\.json, so no release; expected MODEL@CHANNEL"),
        ("gs://bucket/mini", r"gs://bucket/mini: expected a directory or s3://bucket/prefix"),
    ],
)
def test_what_is_not_there_is_named(settings: Publish, bundle: Path, name: str, message: str):
    publish_release(bundle, "mini", settings)
    with pytest.raises(UserError, match=message):
        find_release(name, settings)


def test_too_few_digits_are_refused_with_the_releases_that_begin_so(settings: Publish, bundle: Path):
    publish_release(bundle, "mini", settings)
    twin = Path(settings.to) / "mini" / f"sha256-{SHA[:4]}00000000"
    shutil.copytree(Path(settings.to) / "mini" / f"sha256-{SHA[:12]}", twin)
    with pytest.raises(UserError, match=r"is the beginning of mini/sha256-.*, mini/sha256-.*give more digits"):
        find_release(f"mini/sha256-{SHA[:4]}", settings)
    with pytest.raises(UserError, match=r"is of the adapter .* which is not the one in this folder"):
        find_release(str(twin), settings)


def test_releases_that_were_moved_are_found_where_they_are_now(settings: Publish, bundle: Path, tmp_path: Path):
    publish_release(bundle, "mini", settings)
    point_channel("mini", SHA, settings)
    moved = Path(settings.to).rename(tmp_path / "a b")
    uri, _ = find_release("mini@champion", Publish(to=str(moved)))
    assert uri == f"{moved.as_uri()}/mini/sha256-{SHA[:12]}"
    assert "%20" in uri and find_release(uri, settings) == (uri, SHA)


def test_a_pointer_cannot_lead_out_of_its_store(settings: Publish, bundle: Path):
    publish_release(bundle, "mini", settings)
    pointer = Path(settings.to) / "mini/channels/champion.json"
    pointer.parent.mkdir()
    for model in ("../..", "..", "a/b", ""):
        pointer.write_text(json.dumps({"model": model, "sha256": SHA}))
        with pytest.raises(UserError, match=r"champion\.json: expected the model and sha256 of a release"):
            find_release("mini@champion", settings)


def test_the_adapter_alone_is_four_files_and_everything_is_seven(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)
    for everything, expected in ((False, ADAPTER_ONLY), (True, {path.name for path in bundle.iterdir()})):
        folder = tmp_path / str(everything)
        folder.mkdir()
        download_release(uri, settings, folder, everything=everything)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            name: (bundle / name).read_bytes() for name in expected
        }


def test_releases_are_listed_with_sizes_channels_and_yanks(settings: Publish, bundle: Path, tmp_path: Path):
    assert list_releases(settings) == []
    uri = publish_release(bundle, "mini", settings)
    better = publish_release(write_sealed(tmp_path / "other", weights=b"better"), "mini", settings)
    publish_release(write_sealed(tmp_path / "maxi", model="maxi"), "maxi", settings)
    for channel in ("champion", "previous"):
        point_channel("mini", SHA, settings, channel)
    yank_release(better, settings, reason="worse", who="ann")
    assert {row.model for row in list_releases(settings)} == {"mini", "maxi"}
    rows = {row.uri: row for row in list_releases(settings, "mini")}
    assert rows.keys() == {uri, better}
    first = rows[uri]
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    assert (first.sha256, first.files, first.channels) == (SHA, 8, ("champion", "previous"))
    assert first.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert (first.whole, first.signed, first.yanked) == (True, False, None)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first.time)).total_seconds()) < 600
    yanked = rows[better].yanked
    assert yanked and (yanked.reason, yanked.who) == ("worse", "ann")


def test_verifying_names_every_object_that_is_wrong(settings: Publish, bundle: Path):
    uri = publish_release(bundle, "mini", settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    found = catalog.verify_release(uri, settings)
    assert (found.sha256, found.files, found.signature, found.yanked) == (SHA, 8, "none", None)
    weights = folder / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"wEights")
    (folder / "grid.png").unlink()
    (folder / "extra.bin").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        catalog.verify_release(uri, settings)
    got = hashlib.sha256(b"wEights").hexdigest()
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for part in (
        f"pytorch_lora_weights.safetensors: expected sha256 {SHA[:12]}..., got {got[:12]}...",
        "grid.png: is listed in manifest.json and missing",
        "extra.bin: is not listed in manifest.json",
    ):
        assert sum(part in line for line in lines) == 1


def test_a_manifest_that_was_changed_with_its_files_is_refused_by_the_checksums(settings: Publish, bundle: Path):
    uri = publish_release(bundle, "mini", settings)
    folder = Path(settings.to) / "mini" / f"sha256-{SHA[:12]}"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "grid.png").write_bytes(b"evil")
    for file in manifest["files"]:
        if file["name"] == "grid.png":
            file["sha256"] = hashlib.sha256(b"evil").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: does not list the files of SHA256SUMS"):
        find_release(uri, settings)


def test_a_yanked_release_is_refused_to_all_who_do_not_ask_for_it(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)
    before = state(Path(settings.to))
    record = yank_release(uri, settings, reason="six fingers", who="ann")
    assert record == f"{uri}/yanked.json"
    assert before.items() <= state(Path(settings.to)).items()
    assert yank_release(uri, settings, reason="six fingers", who="ann") == record
    with pytest.raises(UserError, match=r"was yanked by ann on .*: six fingers; it stays so"):
        yank_release(uri, settings, reason="something else", who="bob")
    for refused in (
        lambda: find_release(uri, settings),
        lambda: download_release(uri, settings, tmp_path),
        lambda: pull_release(uri, settings, tmp_path / "out"),
        lambda: point_channel("mini", SHA, settings),
    ):
        with pytest.raises(UserError, match=r"was yanked by ann on 20\d\d-.*: six fingers; "):
            refused()
    assert not (tmp_path / "out").exists()
    assert find_release(uri, settings, yanked=True) == (uri, SHA)
    assert (pull_release(uri, settings, tmp_path / "out", yanked=True) / "SHA256SUMS").is_file()


def test_what_a_channel_points_to_cannot_be_yanked(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)
    other = publish_release(write_sealed(tmp_path / "other", weights=b"better"), "mini", settings)
    point_channel("mini", SHA, settings)
    point_channel("mini", SHA, settings, "previous")
    with pytest.raises(UserError, match="champion, previous points to it; roll back first"):
        yank_release(uri, settings, reason="six fingers", who="ann")
    assert not list(Path(settings.to).rglob("yanked.json"))
    yank_release(other, settings, reason="six fingers", who="ann")
    with pytest.raises(UserError, match="--reason: is empty"):
        yank_release(uri, settings, reason=" ", who="ann")


def test_pulling_again_does_nothing_and_other_folders_are_left_alone(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)
    out = tmp_path / "out"
    out.mkdir()
    assert pull_release(uri, settings, out) == out
    assert {path.name for path in out.iterdir()} == ADAPTER_ONLY
    before = state(out)
    pull_release(uri, settings, out)
    assert state(out) == before
    with pytest.raises(UserError, match="neither an empty folder nor the release"):
        pull_release(uri, settings, out, everything=True)
    (out / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=f"--out: {out}: exists, and is neither"):
        pull_release(uri, settings, out)
    assert (out / "note.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"bundle/README\.md: exists"):
        pull_release(uri, settings, bundle / "README.md")


def _pulled(kind: str, uri: str, settings: Publish, cache: Path) -> tuple[str, int]:
    if kind == "adapter":
        folder = pull_release(uri, settings, cache / "mini")
    else:
        folder = references.open_adapter(uri, references.Places(cache, None, settings), everything=True).weights.parent
    verify(folder, ADAPTER_FILES)
    return folder.name, len(list(folder.iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_of_twelve_processes_that_pull_into_one_cache_all_have_the_whole_release(
    settings: Publish, bundle: Path, tmp_path: Path, kind: str
):
    uri = publish_release(bundle, "mini", settings)
    cache = tmp_path / "cache"
    name, count = (
        ("mini", len(ADAPTER_ONLY)) if kind == "adapter" else (f"sha256-{SHA[:12]}-all", len(list(bundle.iterdir())))
    )
    assert at_once(_pulled, kind, uri, settings, cache) == [(name, count)] * 12
    assert [path.name for path in cache.iterdir()] == [name]


def test_a_damaged_release_in_a_cache_is_downloaded_again(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)

    def get() -> Path:
        places = references.Places(tmp_path / "cache", None, settings)
        return references.open_adapter(uri, places, everything=True).weights.parent

    (get() / "scheduler_config.json").unlink()
    verify(get())


def test_a_folder_that_cannot_be_written_is_named(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/out: cannot be written: Not a directory; nothing was left"):
        pull_release(uri, settings, tmp_path / "file" / "out")


def test_a_directory_gives_no_links(settings: Publish, bundle: Path):
    uri = publish_release(bundle, "mini", settings)
    with pytest.raises(UserError, match="a directory gives no links; they need a release at s3://"):
        presigned_links(uri, settings, 60)
    with pytest.raises(UserError, match=r"--expires: expected 1 to 604800 seconds \(7 days\), got 604801"):
        presigned_links(uri, settings, 604801)


SWAP = """
import sys
from pathlib import Path
from lcmlora.releases.stores.directory import DirectoryStore
store, name = DirectoryStore(Path(sys.argv[1])), "mini/channels/champion.json"
tag = store.read(name)[1]
print("ready", flush=True)
sys.stdin.readline()
print(int(store.swap(name, sys.argv[2].encode(), tag)))
"""


def test_of_processes_that_swap_the_same_pointer_in_a_directory_one_succeeds(tmp_path: Path):
    store = DirectoryStore(tmp_path)
    for turn in range(3):
        current = store.read("mini/channels/champion.json")
        assert store.swap("mini/channels/champion.json", f"turn {turn}".encode(), current[1] if current else None)
        command = [sys.executable, "-c", SWAP, str(tmp_path)]
        processes = [
            subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for n in range(4)
        ]
        for each in processes:
            assert each.stdout and each.stdout.readline() == "ready\n"
        for each in processes:
            assert each.stdin
            each.stdin.write("go\n")
            each.stdin.flush()
        results = [int(each.communicate()[0]) for each in processes]
        assert sorted(results) == [0, 0, 0, 1]
        winner = store.read("mini/channels/champion.json")
        assert winner and winner[0] == str(results.index(1)).encode()
