"""Releases in a repository of the hub, by its own client and a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lcmlora.config import Publish
from lcmlora.errors import NotFound, Unavailable, UserError
from lcmlora.registry.references import Places, open_adapter
from lcmlora.registry.retention.plan import releases_of
from lcmlora.releases.catalog import find_release, list_releases, presigned_links, pull_release, verify_release
from lcmlora.releases.publish import point_channel, point_channel_of, publish_release, yank_release
from lcmlora.releases.stores.hub import HubStore
from lcmlora.releases.stores.store import open_store, page_of
from tests.support import hub_server
from tests.support.hub_server import Answer, Blob, HubServer, error
from tests.support.releases import write_sealed

SHA, BETTER = (hashlib.sha256(content).hexdigest() for content in (b"weights", b"better"))
BRANCH, OTHER = f"sha256-{SHA[:12]}", f"sha256-{BETTER[:12]}"
REPOSITORY = "owls/lcm-lora-mini"
SETTINGS = Publish(to=f"hf://{REPOSITORY}")
ADDRESS = f"hf://{REPOSITORY}/mini/{BRANCH}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with hub_server.serving(tmp_path / "hub-cache") as served:
        yield served


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_sealed(tmp_path / "bundle")


@pytest.fixture
def better(tmp_path: Path) -> Path:
    return write_sealed(tmp_path / "better", weights=b"better", card="a better card\n")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the client nor the store waits between its attempts."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_release_is_a_branch_with_the_bundles_files_in_the_top_folder_of_a_private_repository(
    hub: HubServer, bundle: Path
):
    assert publish_release(bundle, "mini", SETTINGS) == ADDRESS
    repository = hub.repositories[REPOSITORY]
    assert (repository.visibility, repository.gated) == ("private", False)
    files = hub.files(REPOSITORY, BRANCH)
    manifest = json.loads(files.pop("manifest.json"))
    assert files == {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert (manifest["model"], manifest["sha256"]) == ("mini", SHA)
    assert {name for name, blob in repository.find(BRANCH).files.items() if blob.lfs} == {  # type: ignore[union-attr]
        "pytorch_lora_weights.safetensors",
        "grid.png",
    }
    # The claim, the files and the manifest: three steps of the branch's history.
    assert hub.count(r"POST .*/commit/") == 3
    assert hub.files(REPOSITORY, "main") == {}  # nothing is champion yet


def test_publishing_again_writes_nothing(hub: HubServer, bundle: Path):
    publish_release(bundle, "mini", SETTINGS)
    before = dict(hub.repositories[REPOSITORY].branches)
    hub.requests.clear()
    assert publish_release(bundle, "mini", SETTINGS) == ADDRESS
    assert hub.repositories[REPOSITORY].branches == before
    assert not [request for request in hub.requests if request.startswith(("PUT", "POST")) and "paths" not in request]


def test_the_channel_is_a_branch_that_draws_and_main_shows_the_champion(hub: HubServer, bundle: Path, better: Path):
    publish_release(bundle, "mini", SETTINGS)
    assert point_channel("mini", SHA, SETTINGS) == f"hf://{REPOSITORY}/mini/channels/champion.json"
    publish_release(better, "mini", SETTINGS)
    (better / "README.md").unlink()
    for sha256, branch in ((BETTER, OTHER), (SHA, BRANCH)):
        point_channel_of("mini", sha256, f"hf://{REPOSITORY}/mini/{branch}", Publish(to="elsewhere"))
        for revision in ("champion", "main"):
            files = hub.files(REPOSITORY, revision)
            pointer = json.loads(files.pop(".channel.json"))
            assert (pointer["channel"], pointer["sha256"]) == ("champion", sha256)
            assert files == hub.files(REPOSITORY, branch)
        assert find_release("mini@champion", SETTINGS) == (f"hf://{REPOSITORY}/mini/{branch}", sha256)
    before = dict(hub.repositories[REPOSITORY].branches)
    point_channel("mini", SHA, SETTINGS)
    assert hub.repositories[REPOSITORY].branches == before


def test_a_release_is_found_listed_verified_pulled_and_yanked(
    hub: HubServer, bundle: Path, better: Path, tmp_path: Path
):
    publish_release(bundle, "mini", SETTINGS)
    other = publish_release(better, "mini", SETTINGS)
    pointer = point_channel("mini", SHA, SETTINGS)
    for name in (ADDRESS, pointer, "mini@champion", f"mini/sha256-{SHA[:6]}"):
        assert find_release(name, SETTINGS) == (ADDRESS, SHA)
    for name in (f"hf://{REPOSITORY}@champion", f"hf://{REPOSITORY}@{BRANCH}"):
        assert verify_release(name, Publish(to="nowhere")).files == 8
    assert (pull_release(f"hf://{REPOSITORY}@main", SETTINGS, tmp_path / "out") / "SHA256SUMS").is_file()
    found = open_adapter("mini@champion", Places(tmp_path / "cache", None, SETTINGS), everything=True)
    assert {path.name: path.read_bytes() for path in found.weights.parent.iterdir()} == {
        path.name: path.read_bytes() for path in bundle.iterdir()
    }
    with pytest.raises(UserError, match="champion points to it; roll back first"):
        yank_release(ADDRESS, SETTINGS, reason="six fingers", who="ann")
    yank_release(other, SETTINGS, reason="six fingers", who="ann")
    with pytest.raises(UserError, match=r"was yanked by ann on .*: six fingers"):
        pull_release(other, SETTINGS, tmp_path / "none")
    rows = {row.uri: row for row in list_releases(SETTINGS)}
    assert rows.keys() == {ADDRESS, other}
    assert (rows[ADDRESS].channels, rows[ADDRESS].files, rows[ADDRESS].whole) == (("champion",), 8, True)
    assert rows[other].yanked and rows[other].files == 9
    with pytest.raises(UserError, match=r"hf://owner/name gives no links; they need a release at s3://"):
        presigned_links(ADDRESS, SETTINGS, 60)


def test_of_publishers_of_one_release_at_once_all_succeed_and_of_two_card_writers_one(
    hub: HubServer, bundle: Path, tmp_path: Path
):
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: publish_release(bundle, "mini", SETTINGS), range(3))) == {ADDRESS}
    assert verify_release(ADDRESS, SETTINGS).files == 8
    repository = hub.repositories[REPOSITORY]
    unfinished = {n: b for n, b in repository.find(BRANCH).files.items() if n != "manifest.json"}  # type: ignore[union-attr]
    repository.commit(BRANCH, unfinished, "as a killed publisher left it")
    before = dict(repository.branches)
    with pytest.raises(UserError, match=r"SHA256SUMS: holds sha256 .* another publisher began this release"):
        publish_release(write_sealed(tmp_path / "other", card="another's\n"), "mini", SETTINGS)
    assert repository.branches == before
    assert publish_release(bundle, "mini", SETTINGS) == ADDRESS
    assert [row.whole for row in list_releases(SETTINGS)] == [True]


def test_a_branch_that_moves_during_a_commit_is_looked_at_again(hub: HubServer, bundle: Path):
    def meanwhile() -> None:
        repository = hub.repositories[REPOSITORY]
        files = repository.find(BRANCH).files  # type: ignore[union-attr]
        repository.commit(BRANCH, files | {"grid.png": Blob((bundle / "grid.png").read_bytes(), True)}, "another's")

    publish_release(bundle, "mini", SETTINGS)
    hub.repositories[REPOSITORY].branches.pop(BRANCH)
    hub.at(f"POST .*/commit/{BRANCH}", meanwhile)  # the claim finds the branch moved: 412
    assert publish_release(bundle, "mini", SETTINGS) == ADDRESS
    assert verify_release(ADDRESS, SETTINGS).files == 8


def test_a_channel_that_moved_meanwhile_is_not_overwritten(hub: HubServer, bundle: Path, better: Path):
    publish_release(bundle, "mini", SETTINGS)
    publish_release(better, "mini", SETTINGS)
    point_channel("mini", SHA, SETTINGS)
    store, name = open_store(SETTINGS), "mini/channels/champion.json"
    content, tag = store.read(name) or (b"", "")
    point_channel("mini", BETTER, SETTINGS)
    after = store.read(name)
    assert store.swap(name, content, tag) is False and store.swap(name, content, None) is False
    assert store.read(name) == after
    assert isinstance(store, HubStore)
    hub.at(r"POST .*/commit/main", lambda: error(412, "A commit has happened since."))
    point_channel("mini", SHA, SETTINGS)  # main is brought to the state of the channel on the second attempt
    assert json.loads(hub.files(REPOSITORY, "main")[".channel.json"])["sha256"] == SHA


@pytest.mark.slow
def test_a_publisher_killed_anywhere_leaves_no_release_and_the_next_run_completes_it(hub: HubServer, bundle: Path):
    writes = r"^(POST|PUT) (?!.*paths-info)"
    publish_release(bundle, "mini", SETTINGS)
    point_channel("mini", SHA, SETTINGS)
    whole, steps = hub.files(REPOSITORY, "main"), hub.count(writes)
    assert steps > 10
    for step in range(steps):
        hub.repositories.clear()
        hub.objects.clear()
        hub.requests.clear()
        hub.at(writes, iter([None] * step).__next__, times=step)
        hub.at(writes, lambda: error(400, "killed"), times=1000)
        with pytest.raises(UserError):
            publish_release(bundle, "mini", SETTINGS)
            point_channel("mini", SHA, SETTINGS)
        hub.faults.clear()
        publish_release(bundle, "mini", SETTINGS)
        point_channel("mini", SHA, SETTINGS)
        files = hub.files(REPOSITORY, "main")
        assert files == hub.files(REPOSITORY, "champion"), step
        # The pointer has the time.
        assert files | {".channel.json": whole[".channel.json"]} == whole, step
        assert verify_release(ADDRESS, SETTINGS).files == 8


def test_bytes_that_were_damaged_at_the_hub_are_refused_by_name(hub: HubServer, bundle: Path, tmp_path: Path):
    hub.damaged["README.md"] = b"darn\n"
    with pytest.raises(UserError, match=r"README\.md: holds sha256 .*, expected"):
        publish_release(bundle, "mini", SETTINGS)
    hub.damaged.clear()
    publish_release(bundle, "mini", SETTINGS)
    hub.damaged["pytorch_lora_weights.safetensors"] = b"wEights"
    for refused in (
        lambda: verify_release(ADDRESS, SETTINGS),
        lambda: pull_release(ADDRESS, SETTINGS, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors: expected sha256"):
            refused()
    assert not (tmp_path / "out").exists()


def test_a_gated_repository_is_private_until_it_is_gated(hub: HubServer, bundle: Path):
    made: list[str] = []
    hub.at(r"PUT .*/settings", lambda: made.append(hub.repositories[REPOSITORY].visibility))
    publish_release(bundle, "mini", SETTINGS.model_copy(update={"access": "gated"}))
    repository = hub.repositories[REPOSITORY]
    assert (made, repository.visibility, repository.gated) == (["private"], "public", "manual")


def test_a_repository_that_is_more_open_than_the_setting_or_anothers_is_left_alone(
    hub: HubServer, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    publish_release(bundle, "mini", SETTINGS.model_copy(update={"access": "public"}))
    other = write_sealed(tmp_path / "other", weights=b"better")
    with pytest.raises(UserError, match=r"is public, and publish\.access is private; change it in .*'s settings"):
        publish_release(other, "mini", SETTINGS)
    hub.repositories[REPOSITORY].visibility = "private"
    publish_release(other, "mini", SETTINGS.model_copy(update={"access": "gated"}))
    assert f"note: hf://{REPOSITORY} is private, and publish.access is gated" in capsys.readouterr().err
    maxi = write_sealed(tmp_path / "maxi", model="maxi", weights=b"maxi")
    with pytest.raises(UserError, match=r"has releases of mini, not of maxi; .* hf://owls/lcm-lora-\{model\}$"):
        publish_release(maxi, "maxi", SETTINGS)
    publish_release(maxi, "maxi", Publish(to="hf://owls/lcm-lora-{model}"))
    assert hub.repositories.keys() == {REPOSITORY, "owls/lcm-lora-maxi"}
    repository = hub.repositories["owls/lcm-lora-maxi"]
    repository.branches.pop(next(name for name in repository.branches if name != "main"))
    repository.commit("main", {"model.bin": Blob(b"a person's", False)}, "mine")
    with pytest.raises(UserError, match=r"has files that lcmlora did not publish; name a repository of its own"):
        publish_release(maxi, "maxi", Publish(to="hf://owls/lcm-lora-maxi"))
    assert hub.files("owls/lcm-lora-maxi", "main") == {"model.bin": b"a person's"}


def test_names_below_an_address_with_a_place_for_the_model_need_the_model(hub: HubServer, bundle: Path):
    settings = Publish(to="hf://owls/lcm-lora-{model}")
    uri = publish_release(bundle, "mini", settings)
    point_channel("mini", SHA, settings)
    assert find_release("mini@champion", settings) == (uri, SHA) == find_release(f"mini/sha256-{SHA[:6]}", settings)
    assert [row.uri for row in list_releases(settings, "mini")] == [uri]
    with pytest.raises(UserError, match=r"names a store for each model; name the model, as MODEL@CHANNEL does"):
        list_releases(settings)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, r"creation: .*401 .*HF_TOKEN must have the right"),
        (hub_server.READER, r"creation: 403 .*HF_TOKEN must have the right"),
        ("hf_MARKED_SECRET_wrong", r"401 .*HF_TOKEN must have the right"),
    ],
)
def test_a_token_that_may_not_write_is_told_without_showing_it(
    bundle: Path, tmp_path: Path, token: str | None, expected: str
):
    with hub_server.serving(tmp_path / "hub-cache", token) as hub:
        with pytest.raises(UserError, match=expected) as caught:
            publish_release(bundle, "mini", SETTINGS)
        assert "MARKED" not in str(caught.value) and "\n" not in str(caught.value)
        assert not isinstance(caught.value, Unavailable)
        assert hub.repositories == {}


def test_a_private_repository_is_read_with_a_token_and_missing_without(
    hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    publish_release(bundle, "mini", SETTINGS)
    monkeypatch.setenv("HF_TOKEN", hub_server.READER)
    assert find_release(ADDRESS, SETTINGS) == (ADDRESS, SHA)
    with pytest.raises(UserError, match=r"403 .*HF_TOKEN must have the right"):
        point_channel("mini", SHA, SETTINGS)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"Repository Not Found .*HF_TOKEN must have the right"):
        pull_release(ADDRESS, SETTINGS, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, pytest.param(503, marks=pytest.mark.slow)])
def test_a_busy_hub_is_asked_again_and_then_told_as_unavailable(
    hub: HubServer, bundle: Path, patient: None, status: int
):
    busy = Answer(status, {"error": "busy"}, {"Retry-After": "1"})
    for pattern in (r"POST .*/repos/create", r"POST .*/commit/", r"GET .*/refs", r"PUT .*/lfs/"):
        hub.at(pattern, lambda: busy)
    assert publish_release(bundle, "mini", SETTINGS) == ADDRESS
    hub.at(r"POST .*/commit/champion", lambda: busy, times=100)
    with pytest.raises(Unavailable, match=rf"a commit on champion: .*{status}.*the channel was not moved") as caught:
        point_channel("mini", SHA, SETTINGS)
    assert "\n" not in str(caught.value)


def test_a_commit_that_succeeded_without_an_answer_is_found_and_not_made_twice(
    hub: HubServer, bundle: Path, patient: None
):
    """The hub answers 500 after it has committed; the repeated commit is refused, since its branch has moved."""
    answers = iter([Answer(500, {"error": "after all"})])

    made = hub._commit

    def commit(*args: object) -> Answer:
        found = made(*args)  # type: ignore[arg-type]
        return next(answers, found) if found.status == 200 else found

    hub._commit = commit  # type: ignore[method-assign, assignment]
    publish_release(bundle, "mini", SETTINGS)
    assert verify_release(ADDRESS, SETTINGS).files == 8
    assert len(hub.repositories[REPOSITORY].commits) == 1 + 3


def test_a_hub_that_does_not_answer_is_told_with_the_consequence(hub: HubServer, bundle: Path, patient: None):
    hub.at(".", lambda: Answer(502, {"error": "bad gateway"}), times=1000)
    with pytest.raises(Unavailable, match=r"publish\.to: owls/lcm-lora-mini: .*the release is kept, and the next run"):
        publish_release(bundle, "mini", SETTINGS)


@pytest.mark.parametrize(
    "to", ["hf://", "hf://owls", "hf://owls/a b", "hf://owls/mini@main/mini/sha256-0", "hf://o/{m}"]
)
def test_an_address_that_is_no_repository_is_refused(to: str, bundle: Path):
    message = rf"publish\.to: expected hf://owner/name, or hf://owner/name@revision to read, got '{re.escape(to)}'"
    with pytest.raises(UserError, match=message):
        publish_release(bundle, "mini", Publish(to=to))


def test_an_object_is_deleted_by_a_commit_and_a_branch_with_its_last_object(hub: HubServer, bundle: Path):
    publish_release(bundle, "mini", SETTINGS)
    point_channel("mini", SHA, SETTINGS)
    store = open_store(SETTINGS)
    assert isinstance(store, HubStore)
    store.delete("mini/channels/champion.json")
    names = [entry.name for entry in store.entries("mini/")]
    assert len(names) == 8 and all(name.startswith(f"mini/{BRANCH}/") for name in names)
    for name in names:
        store.delete(name)
        store.delete(name)
        assert store.read(name) is None
    assert hub.repositories[REPOSITORY].branches.keys() == {"main"}
    assert publish_release(bundle, "mini", SETTINGS) == ADDRESS


def test_a_release_has_a_page_on_the_hub_and_other_stores_have_the_address_itself(hub: HubServer):
    assert page_of(ADDRESS) == f"{hub.uri}/{REPOSITORY}/tree/{BRANCH}"
    assert page_of(ADDRESS, "README.md") == f"{hub.uri}/{REPOSITORY}/blob/{BRANCH}/README.md"
    assert page_of(f"hf://{REPOSITORY}@champion") == f"{hub.uri}/{REPOSITORY}/tree/champion"
    assert page_of("s3://models/mini/sha256-0", "README.md") == "s3://models/mini/sha256-0/README.md"
    assert page_of("file:///releases/mini") == "file:///releases/mini"


def test_a_folder_that_cannot_be_written_is_no_fault_of_the_hub(hub: HubServer, bundle: Path, tmp_path: Path):
    publish_release(bundle, "mini", SETTINGS)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/out: cannot be written: Not a directory; nothing was left"):
        pull_release(ADDRESS, SETTINGS, tmp_path / "file" / "out")


def test_a_revision_is_for_reading_and_a_repository_alone_is_no_release(hub: HubServer, bundle: Path):
    publish_release(bundle, "mini", SETTINGS)
    with pytest.raises(UserError, match="is no name of a release's file or of a channel"):
        open_store(Publish(to=f"hf://{REPOSITORY}@main")).create("a", b"a", hashlib.sha256(b"a").hexdigest())
    with pytest.raises(UserError, match=r"holds no manifest\.json, so no release; expected .*hf://owner/name@CHANNEL"):
        find_release(f"hf://{REPOSITORY}", SETTINGS)


def test_a_repository_that_was_never_made_holds_nothing_that_could_be_pruned(hub: HubServer, bundle: Path, capsys):
    with pytest.raises(NotFound):
        open_store(SETTINGS, key="publish.to", consequence="ask again later").entries("mini/")
    assert releases_of([], SETTINGS, "mini") == ([], {})
    assert REPOSITORY in capsys.readouterr().err
    publish_release(bundle, "mini", SETTINGS)
    (stored,), _ = releases_of([], SETTINGS, "mini")
    assert stored.uri == ADDRESS
