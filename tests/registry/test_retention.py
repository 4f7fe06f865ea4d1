"""What `lcmlora prune` keeps and deletes of versions, runs and releases, and what a kill leaves."""

import contextlib
import datetime
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from lcmlora import registry
from lcmlora.config import Gate, Publish
from lcmlora.errors import NotFound, Unavailable, UserError
from lcmlora.inference import serving
from lcmlora.registry import events, lookup, promotion
from lcmlora.registry.approval.standing import REQUESTED
from lcmlora.registry.registration import Registered, register_release
from lcmlora.registry.retention import database, plan, removal, selection, tombstones
from lcmlora.registry.retention.plan import Plan
from lcmlora.registry.tracking import log_run
from lcmlora.releases import bundle, catalog, publish
from lcmlora.releases.removal import PRUNED
from lcmlora.releases.stores.directory import DirectoryStore
from lcmlora.settings.services import Retention
from tests.support.registries import fresh
from tests.support.releases import write_sealed

NAME = "lcm-lora-mini"
NOW = datetime.datetime(2027, 6, 1, tzinfo=datetime.UTC)


class Killed(BaseException):
    """The end of a process in the middle of a call."""


class Shelf:
    """Six published versions: /4 is champion, /3 previous, /2 has the channel `beta` of another project."""

    def __init__(self, root: Path, factory: pytest.TempPathFactory) -> None:
        self.root, self.settings = root, fresh(root, factory)
        self.store = Publish(to=str(root / "releases"))
        self.folders: list[Path] = []

    def add(self, weights: str, rejected: str = "") -> Registered:
        folder = write_sealed(self.root / "made" / weights, weights=weights.encode())
        self.folders.append(folder)
        uri = publish.publish_release(folder, "mini", self.store)
        return register_release("mini", self.settings, folder, uri, [rejected] if rejected else [])

    def plan(self, **rules: Any) -> Plan:
        settings = Retention(versions=1, days=30)
        found = selection.Rules(settings, rules.pop("now", NOW), **rules)
        return plan.make_plan(self.settings, self.store, ["mini"], found)

    def prune(self, **rules: Any) -> None:
        remover = removal.Remover(self.settings, self.store, "ada")
        found = self.plan(**rules)
        for name, stone in found.unfinished:
            remover.finish(name, stone)
        for version in found.versions:
            remover.remove_version(version)
        for run in found.runs:
            remover.remove_run(run)

    def client(self) -> Any:
        return MlflowClient(tracking_uri=self.settings.tracking_uri, registry_uri=self.settings.tracking_uri)

    def aliases(self) -> dict[str, int]:
        found = self.client().get_registered_model(NAME).aliases
        return {alias: int(number) for alias, number in found.items()}

    def numbers(self) -> list[int]:
        return [version.version for version in registry.versions(self.settings, NAME)]

    def check_names(self) -> None:
        """Each alias names a version that can be pulled, each channel a whole release."""
        for alias in self.aliases():
            registry.pull(f"mini@{alias}", self.settings, everything=True)
        for pointer in (self.root / "releases/mini/channels").glob("*.json"):
            catalog.verify_release(f"mini@{pointer.stem}", self.store)
        for version in registry.versions(self.settings, NAME):
            assert self.client().list_artifacts(version.run_id, "model/artifacts/release"), version.reference

    def left(self) -> tuple[list[int], list[str], list[str], dict[str, int]]:
        runs = [run for run in (self.root / "mlruns").rglob("artifacts") if run.parent.name != "model"]
        releases = sorted(path.name for path in (self.root / "releases/mini").glob("sha256-*"))
        return self.numbers(), releases, sorted(run.parent.name for run in runs), self.aliases()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shelf, Path]]:
    """The shelf, and a copy of its folder."""
    root, model = tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("model") / "model"
    serving.write_model(model, model=NAME, base={})

    def write_model(folder: Path, **_: object) -> None:
        shutil.copytree(model, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "write_model", write_model)  # it takes a second, and is the same for all
        patch.chdir(root)
        shelf = Shelf(root, tmp_path_factory)
        shelf.add("one")
        other = shelf.add("two")
        for weights in ("three", "four"):
            promotion.promote_passed(shelf.add(weights), shelf.settings, reason="passed")
            publish.point_channel("mini", registry.resolve("mini@champion", shelf.settings).sha256, shelf.store)
        publish.point_channel("mini", other.sha256, shelf.store, "beta")
        shelf.add("five", rejected="blurred")
        shelf.add("six", rejected="blurred")
        with log_run(shelf.settings, "mini", {}) as run:
            assert run.id
        with log_run(shelf.settings, "another", {}) as run:
            assert run.id
        copy = tmp_path_factory.mktemp("copy") / "shelf"
        shutil.copytree(root, copy)
        yield shelf, copy


@pytest.fixture
def shelf(filled: tuple[Shelf, Path], monkeypatch: pytest.MonkeyPatch) -> Shelf:
    restore(*filled)
    monkeypatch.chdir(filled[0].root)
    return filled[0]


def restore(shelf: Shelf, copy: Path) -> None:
    """Brings the shelf back as it was, in its place. MLflow keeps its database open, so the file itself stays."""
    for path in shelf.root.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    for path in copy.iterdir():
        if path.is_dir():
            shutil.copytree(path, shelf.root / path.name)
    with (
        contextlib.closing(sqlite3.connect(copy / "mlflow.db")) as source,
        contextlib.closing(sqlite3.connect(shelf.root / "mlflow.db")) as target,
    ):
        source.backup(target)


def test_what_has_a_name_is_kept_and_all_of_the_others_goes(shelf: Shelf):
    found = shelf.plan()
    assert [each.version.version for each in found.versions] == [5, 1]
    assert all(each.artifact_bytes and len(each.releases) == 1 for each in found.versions)
    assert [run.why for run in found.runs] == ["finished without a version, older than 30 days"]
    kept = {reference.rpartition("/")[2]: why for reference, why in found.kept}
    assert kept["4"] == "is @champion" and kept["3"] == "is @previous" and kept["6"] == "is among the newest 1"
    assert kept["2"].startswith("channel beta of file:///") and kept["2"].endswith(" points to its release")
    shelf.prune()
    assert shelf.numbers() == [6, 4, 3, 2]
    assert len(list((shelf.root / "releases/mini").glob("sha256-*"))) == 4
    shelf.check_names()
    assert shelf.plan().versions == shelf.plan().runs == shelf.plan().unfinished == ()


def test_releases_in_a_former_store_go_too_and_what_is_no_release_stays(shelf: Shelf):
    former = Publish(to=str(shelf.root / "former"))
    uris = [publish.publish_release(shelf.folders[0], "mini", store) for store in (shelf.store, former)]
    shelf.client().set_model_version_tag(NAME, "1", lookup.URIS, json.dumps(uris))
    probe = shelf.root / "former/mini/sha256-probe"  # as on an S3 server that was tried
    probe.write_text("tried")

    shelf.prune()

    assert [path.name for path in probe.parent.glob("sha256-*")] == [probe.name]


def test_what_is_young_waits_for_approval_or_is_in_this_folder_is_kept(shelf: Shelf):
    assert shelf.plan(now=datetime.datetime.now(datetime.UTC)).versions == ()
    shelf.client().set_model_version_tag(NAME, "5", *events.event_tag(REQUESTED))
    kept = shelf.plan().kept
    assert (f"{NAME}/5", "waits for approval") in kept
    one = registry.resolve("mini/1", shelf.settings)
    kept = shelf.plan(local=frozenset({one.sha256})).kept
    assert (f"{NAME}/1", "is the adapter in this folder") in kept


def test_a_lookup_of_a_pruned_version_says_so_in_one_line(shelf: Shelf):
    sha256 = registry.resolve("mini/1", shelf.settings).sha256
    shelf.prune()
    says = "lcm-lora-mini/1: was pruned on .* by ada .older than 30 days, and not among the newest 1"
    with pytest.raises(NotFound, match=says):
        registry.pull("mini/1", shelf.settings)
    with pytest.raises(NotFound, match=f"{sha256[:12]}: is the adapter of {says}"):
        registry.resolve(sha256[:12], shelf.settings)
    with pytest.raises(UserError, match=says):
        promotion.promote("mini/1", shelf.settings, Gate(), reason="back", override=True)
    with pytest.raises(UserError, match=says):
        promotion.rollback(NAME, shelf.settings, reason="back", to=1)
    assert [e.version for e in promotion.history(NAME, shelf.settings) if e.action == "pruned"] == [5, 1]
    assert shelf.aliases() == {"champion": 4, "previous": 3}


def test_a_pruned_adapter_that_is_made_again_is_a_new_version_with_a_release_of_its_own(shelf: Shelf):
    shelf.prune()
    uri = publish.publish_release(shelf.folders[0], "mini", shelf.store)
    again = register_release("mini", shelf.settings, shelf.folders[0], uri)
    assert (again.version, again.created, again.promoted) == (7, True, False)
    promotion.promote_passed(again, shelf.settings, reason="back")
    publish.point_channel("mini", again.sha256, shelf.store)
    shelf.check_names()


def _changes(counting: Callable[[str], None]) -> Iterator[Any]:
    """Patches for all calls that change the registry, the artifacts or the store: `counting` is called before each."""
    calls = {
        MlflowClient: (
            *("set_model_version_tag", "delete_model_version_tag", "set_registered_model_tag"),
            *("delete_model_version", "set_tag", "delete_run"),
        ),
        DirectoryStore: ("create", "delete"),
        LocalArtifactRepository: ("delete_artifacts",),
    }
    for cls, names in calls.items():
        for name in names:
            plain = getattr(cls, name)

            def counted(*arguments: Any, _plain: Any = plain, _name: str = name, **named: Any) -> Any:
                counting(_name)
                return _plain(*arguments, **named)

            yield mock.patch.object(cls, name, counted)


@contextlib.contextmanager
def _calling(counting: Callable[[str], None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in _changes(counting):
            stack.enter_context(patch)
        yield


def check_kills(filled: tuple[Shelf, Path], wanted: Callable[[list[str]], list[int]]) -> None:
    """Kills a prune before some of its changes, and expects the next one to end as an undisturbed one.

    Args:
        wanted: returns the numbers of the changes before which it is killed, of the names of all of them.
    """
    shelf, done = filled[0], []
    with _calling(done.append):
        shelf.prune()
    undisturbed = shelf.left()
    assert len(done) > 30 and {"delete_model_version", "delete_run", "delete", "delete_artifacts"} <= set(done)
    for step in wanted(done):
        restore(*filled)
        left = [step]

        def kill(name: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed(name)

        with _calling(kill), pytest.raises(Killed):
            shelf.prune()
        shelf.check_names()
        shelf.prune()
        assert shelf.left() == undisturbed, done[step]
        assert not list(shelf.root.rglob(PRUNED))


@pytest.mark.slow
def test_a_kill_before_any_change_leaves_no_dangling_name_and_the_next_call_ends_as_an_undisturbed_one(
    filled: tuple[Shelf, Path], shelf: Shelf
):
    check_kills(filled, lambda done: list(range(len(done))))


@pytest.mark.slow
def test_a_kill_before_the_version_goes_or_within_its_release_or_before_its_run_goes_is_made_up_for(
    filled: tuple[Shelf, Path], shelf: Shelf
):
    check_kills(filled, lambda done: [done.index(name) for name in ("delete_model_version", "delete", "delete_run")])


def test_who_gets_a_name_while_it_is_marked_stays(shelf: Shelf):
    """The alias is given after the plan was made, and a channel is moved likewise."""
    five, one = shelf.plan().versions
    shelf.client().set_registered_model_alias(NAME, "candidate", "5")
    publish.point_channel("mini", one.version.sha256, shelf.store, "gamma")
    remover = removal.Remover(shelf.settings, shelf.store, "ada")
    assert [remover.remove_version(five), remover.remove_version(one)] == [False, False]
    assert shelf.numbers() == [6, 5, 4, 3, 2, 1]
    shelf.check_names()


def test_a_release_and_a_run_that_another_version_shares_stay(shelf: Shelf):
    one = shelf.client().get_model_version(NAME, "1")
    again = shelf.client().create_model_version(NAME, one.source, one.run_id, tags=dict(one.tags))
    shelf.client().set_registered_model_alias(NAME, "mine", again.version)
    found = {each.version.version: each.releases for each in shelf.plan().versions}
    assert found[1] == () and len(found[5]) == 1
    shelf.prune()
    assert shelf.numbers() == [7, 4, 3, 2]
    shelf.check_names()
    assert catalog.find_release(f"mini/sha256-{one.tags['sha256'][:12]}", shelf.store)


def test_an_alias_that_a_person_gives_in_mlflow_after_a_kill_keeps_the_version(shelf: Shelf):
    with _calling(lambda name: _kill_before("delete_model_version", name)), pytest.raises(Killed):
        shelf.prune()
    assert [stone.version for _, stone in shelf.plan().unfinished] == [5]
    shelf.client().set_registered_model_alias(NAME, "mine", "5")
    shelf.prune()
    assert shelf.numbers() == [6, 5, 4, 3, 2]
    assert shelf.plan().unfinished == ()
    shelf.check_names()


def test_a_release_that_is_registered_again_after_a_kill_is_kept(shelf: Shelf):
    with _calling(lambda name: _kill_before("delete", name)), pytest.raises(Killed):
        shelf.prune()
    (store := shelf.root / "releases/mini" / f"sha256-{bundle.digest(shelf.folders[4])[:12]}" / PRUNED).unlink()
    again = register_release("mini", shelf.settings, shelf.folders[4], store.parent.as_uri())
    assert again.version == 7
    promotion.promote_passed(again, shelf.settings, reason="back")
    publish.point_channel("mini", again.sha256, shelf.store)
    shelf.prune()
    shelf.check_names()
    assert catalog.verify_release(store.parent.as_uri(), shelf.store)


def _kill_before(change: str, name: str) -> None:
    if name == change:
        raise Killed(name)


def test_no_alias_and_no_channel_is_given_to_what_is_being_pruned(shelf: Shelf):
    one = registry.resolve("mini/1", shelf.settings)
    move = MlflowClient.set_registered_model_alias

    def move_while_it_is_pruned(client: Any, name: str, alias: str, version: str) -> None:
        if version == "1":
            client.set_model_version_tag(name, "1", tombstones.MARK, "2027-06-01T00:00:00Z")
        move(client, name, alias, version)

    with (
        mock.patch.object(MlflowClient, "set_registered_model_alias", move_while_it_is_pruned),
        pytest.raises(NotFound, match="lcm-lora-mini/1: is being pruned"),
    ):
        promotion.promote_passed(one, shelf.settings, reason="back")
    assert shelf.aliases() == {"champion": 4, "previous": 3}
    store, swap = DirectoryStore(shelf.root / "releases"), DirectoryStore.swap
    before = (shelf.root / "releases/mini/channels/champion.json").read_bytes()

    def swap_while_it_is_pruned(own: DirectoryStore, name: str, content: bytes, tag: str | None) -> bool:
        if one.sha256.encode() in content:
            (shelf.root / "releases/mini" / f"sha256-{one.sha256[:12]}" / PRUNED).write_text("{}")
        return swap(own, name, content, tag)

    with (
        mock.patch.object(DirectoryStore, "swap", swap_while_it_is_pruned),
        pytest.raises(Unavailable, match="is being deleted by `lcmlora prune`"),
    ):
        publish.point_channel("mini", one.sha256, shelf.store)
    assert (shelf.root / "releases/mini/channels/champion.json").read_bytes() == before
    with pytest.raises(Unavailable):
        publish.publish_release(shelf.folders[0], "mini", shelf.store)
    assert store.read(f"mini/sha256-{one.sha256[:12]}/manifest.json") is not None


def test_nothing_is_deleted_where_a_pointer_cannot_be_read(shelf: Shelf):
    (shelf.root / "releases/mini/channels/beta.json").write_text("moved by hand")
    with pytest.raises(UserError, match="nobody knows what it points to, no release of mini is deleted"):
        shelf.plan()


@pytest.mark.slow
def test_rows_of_deleted_runs_and_versions_go_and_the_file_shrinks(shelf: Shelf):
    client, before = shelf.client(), database.space(shelf.settings)
    run = registry.resolve("mini/1", shelf.settings).run_id
    from mlflow.entities import Metric

    for start in range(0, 8_000, 1000):
        client.log_batch(run, metrics=[Metric("loss", 0.5, n, n) for n in range(start, start + 1000)])
    grown = database.space(shelf.settings)
    assert before and grown and grown.total > before.total + 400_000
    shelf.prune()
    # One version of each (5 and 1), and their runs with the one without a version.
    assert database.delete_rows(shelf.settings, [NAME]) == 5
    assert database.delete_rows(shelf.settings, [NAME]) == 0
    assert database.compact(shelf.settings)
    after = database.space(shelf.settings)
    assert after and after.total < grown.total - 400_000
    assert database.compact(shelf.settings) is None
    assert shelf.numbers() == [6, 4, 3, 2]
    shelf.check_names()
