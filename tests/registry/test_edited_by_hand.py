"""What people delete and edit on MLflow's page: versions, aliases, models, runs, tags."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lcmlora.config import Registry
from lcmlora.errors import NotFound, UserError
from lcmlora.registry import registration, tracking
from lcmlora.registry.downloads.pulling import pull
from lcmlora.registry.lookup import resolve
from lcmlora.registry.promotion import history, promote_passed, rollback, target_of_rollback
from lcmlora.registry.registration import Registered
from lcmlora.registry.servers import ledger
from lcmlora.releases.catalog import find_release
from lcmlora.releases.publish import publish_release
from lcmlora.tasks.models import follow_champion
from tests.registry.test_promotion import NAME, add, aliases
from tests.support import releases
from tests.support.registries import fresh


@pytest.fixture
def settings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    return fresh(tmp_path, tmp_path_factory)


def page(settings: Registry) -> MlflowClient:
    """Returns what a person does on MLflow's page."""
    return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)


def again(settings: Registry, weights: str) -> Registered:
    """Returns what the next run registers, which promotes as `flows.retrain` does."""
    found = registration.register_release("mini", settings, Path(weights))
    if not found.promoted:
        promote_passed(found, settings, reason="passed the gate")
    return found


def champions(settings: Registry, *weights: str) -> None:
    for each in weights:
        promote_passed(add(settings, each), settings, reason="better")


def test_a_champion_that_was_deleted_does_not_come_back_until_a_person_readmits_it(settings: Registry):
    champions(settings, "one", "two")
    page(settings).delete_model_version(NAME, "2")
    for _ in range(2):
        found = again(settings, "two")
        assert (found.deleted, found.version, found.created, found.aliases) == (True, 2, False, ())
        assert aliases(settings) == {"previous": 1}
    assert registration.readmit("mini", settings, Path("two")) == f"{NAME}/2"
    found = again(settings, "two")
    assert (found.deleted, found.version, found.created) == (False, 3, True)
    assert aliases(settings) == {"champion": 3, "previous": 1}
    with pytest.raises(UserError, match="two: no version of its adapter was deleted"):
        registration.readmit("mini", settings, Path("two"))


@pytest.mark.slow
def test_the_same_training_packaged_again_does_not_bring_a_deleted_version_back(settings: Registry):
    for name in ("one", "again"):
        releases.write_sealed(Path(name), weights=name.encode(), adapter="a" * 64)
    registration.register_release("mini", settings, Path("one"))
    page(settings).delete_model_version(NAME, "1")
    assert again(settings, "again").deleted


@pytest.mark.slow
def test_a_model_that_was_deleted_whole_does_not_come_back_with_the_same_adapter(settings: Registry):
    champions(settings, "one")
    page(settings).delete_registered_model(NAME)
    assert again(settings, "one").deleted
    champions(settings, "two")
    assert aliases(settings) == {"champion": 1}
    assert again(settings, "one").deleted
    registration.readmit("mini", settings, Path("one"))
    assert again(settings, "one").version == 2


@pytest.mark.parametrize(
    ("champion", "previous", "recorded", "target"),
    [
        (3, 2, [1, 2, 3], 2),
        (None, 2, [1, 2], 2),  # version 3 was deleted
        (3, None, [1, 3], 1),  # version 2 was deleted
        (3, 4, [1, 2, 3], 4),  # `previous` was moved
        (2, 2, [1, 2, 3], 1),  # the alias was moved back
        (2, 1, [1, 3], 3),  # the alias was moved on
        (None, 1, [1, 2], 1),  # the alias was removed
        (1, 2, [1, 2, 1], 2),  # promoted twice
    ],
)
def test_the_version_to_go_back_to(champion: int | None, previous: int | None, recorded: list[int], target: int):
    found = {"champion": champion, "previous": previous}
    known = {alias: number for alias, number in found.items() if number is not None}
    assert target_of_rollback(NAME, "champion", known, recorded) == target


@pytest.mark.slow
def test_promoting_an_earlier_champion_again_leaves_the_one_before_as_previous(settings: Registry):
    champions(settings, "one", "two")
    promote_passed(resolve(f"{NAME}/1", settings), settings, reason="after all")
    assert aliases(settings) == {"champion": 1, "previous": 2}
    assert rollback(NAME, settings, reason="no").version == 2


@pytest.mark.slow
def test_rolling_back_goes_to_previous_where_the_champion_was_deleted(settings: Registry):
    champions(settings, "one", "two", "three")
    page(settings).delete_model_version(NAME, "3")
    assert aliases(settings) == {"previous": 2}
    assert rollback(NAME, settings, reason="deleted").version == 2
    assert aliases(settings) == {"champion": 2, "previous": 1}


@pytest.mark.slow
def test_rolling_back_passes_over_a_deleted_version(settings: Registry):
    champions(settings, "one", "two", "three")
    page(settings).delete_model_version(NAME, "2")
    assert rollback(NAME, settings, reason="blurred").version == 1
    assert aliases(settings) == {"champion": 1}


@pytest.mark.slow
def test_rolling_back_goes_to_the_version_that_a_person_called_previous(settings: Registry):
    champions(settings, "one", "two", "three")
    add(settings, "four")
    page(settings).set_registered_model_alias(NAME, "previous", "4")
    assert rollback(NAME, settings, reason="blurred").version == 4
    assert aliases(settings) == {"champion": 4, "previous": 2}


@pytest.mark.slow
def test_a_champion_by_hand_among_the_earlier_ones_counts_as_rolled_back_to(settings: Registry):
    champions(settings, "one", "two", "three")
    page(settings).set_registered_model_alias(NAME, "champion", "2")
    assert rollback(NAME, settings, reason="worse still").version == 1


@pytest.mark.slow
def test_an_alias_that_was_removed_stays_removed_and_previous_is_gone_back_to(settings: Registry):
    champions(settings, "one", "two")
    page(settings).delete_registered_model_alias(NAME, "champion")
    assert not again(settings, "two").deleted
    assert aliases(settings) == {"previous": 1}
    assert rollback(NAME, settings, reason="removed").version == 1
    for alias in ("champion", "previous"):
        page(settings).delete_registered_model_alias(NAME, alias)
    with pytest.raises(UserError, match=r"no version has champion or previous; name .* with --to \(/1 had champion\)"):
        rollback(NAME, settings, reason="which?")


@pytest.mark.slow
def test_a_renamed_model_is_found_by_its_former_name_and_not_made_anew(settings: Registry):
    champions(settings, "one", "two")
    page(settings).rename_registered_model(NAME, "shop")
    for ask in (
        lambda: again(settings, "two"),
        lambda: resolve("mini@champion", settings),
        lambda: resolve("mini/1", settings),
        lambda: history(NAME, settings),
        lambda: rollback(NAME, settings, reason="blurred"),
    ):
        with pytest.raises(NotFound, match="lcm-lora-mini: was renamed to shop in MLflow; rename it back") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert resolve("models:/shop@champion", settings).version == 2
    assert rollback("shop", settings, reason="blurred").version == 1


@pytest.mark.slow
def test_a_release_whose_run_was_deleted_is_registered_anew_and_takes_its_place(settings: Registry):
    champions(settings, "one", "two")
    page(settings).delete_run(resolve(f"{NAME}/2", settings).run_id)
    found = again(settings, "two")
    assert (found.created, found.version) == (True, 3)
    assert aliases(settings) == {"champion": 3, "previous": 2}


@pytest.mark.slow
def test_a_release_whose_files_are_gone_is_uploaded_again_and_stays_champion(settings: Registry):
    champions(settings, "one", "two")
    (lost,) = Path("mlruns").glob(f"*/{resolve(f'{NAME}/2', settings).run_id}")
    shutil.rmtree(lost)
    with pytest.raises(UserError, match="has no release among the artifacts"):
        pull(f"{NAME}/2", settings, Path("pulled"))
    found = again(settings, "two")
    assert (found.created, found.version, found.aliases) == (False, 2, ("champion",))
    assert pull(f"{NAME}/2", settings, Path("pulled")).is_dir()


@pytest.mark.slow
def test_a_release_that_was_rolled_back_stays_so_when_its_files_are_lost(settings: Registry):
    champions(settings, "one", "two")
    rollback(NAME, settings, reason="blurred")
    page(settings).delete_run(resolve(f"{NAME}/2", settings).run_id)
    found = again(settings, "two")
    assert (found.created, found.promoted) == (True, True)
    assert aliases(settings) == {"champion": 1}


@pytest.mark.slow
def test_a_copy_of_a_version_has_none_of_the_originals_history(settings: Registry):
    champions(settings, "one", "two")
    page(settings).copy_model_version(f"models:/{NAME}/1", NAME)
    assert [event.version for event in history(NAME, settings) if event.alias] == [1, 2]
    assert rollback(NAME, settings, reason="blurred").version == 1


@pytest.mark.slow
def test_a_deleted_experiment_is_told_with_what_restores_it(settings: Registry):
    champions(settings, "one")
    number = page(settings).get_experiment_by_name("lcmlora").experiment_id
    page(settings).delete_experiment(number)
    with pytest.raises(UserError, match=rf"experiment lcmlora was deleted: .*--experiment-id {number}\)") as caught:
        add(settings, "two")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="experiment lcmlora was deleted"):
        tracking.check(settings)


@pytest.mark.slow
def test_a_digest_that_was_edited_is_written_again_and_no_second_version_made(settings: Registry):
    champions(settings, "one")
    sha256 = resolve(f"{NAME}/1", settings).sha256
    page(settings).set_model_version_tag(NAME, "1", "sha256", "edited")
    found = again(settings, "one")
    assert (found.created, found.version, resolve(f"{NAME}/1", settings).sha256) == (False, 1, sha256)


def test_the_ledger_is_bounded_and_keeps_the_newest_and_passes_over_what_others_write_into_it(settings: Registry):
    first = add(settings, "one")
    client = page(settings)
    many = " ".join(f"{number}:{number:012x}" for number in range(1000, 1400))
    client.set_registered_model_tag(NAME, ledger.ADAPTERS, f"{many[: ledger.LONGEST]} junk 5: :abc x:y")
    ledger.enter(client, NAME, 2000, "b" * 64, "c" * 64, first.run_id)
    kept = client.get_registered_model(NAME).tags[ledger.ADAPTERS]
    assert len(kept) <= ledger.LONGEST
    assert kept.startswith(f"2000:{'b' * 12} 2000:{'c' * 12} ") and "junk" not in kept


@pytest.mark.slow
def test_the_channel_follows_a_champion_that_a_person_chose(settings: Registry, tmp_path: Path):
    store = {"to": str(tmp_path / "store")}
    config = releases.load_settings(tmp_path / "base", registry=settings.model_dump(), publish=store)
    uris = []
    for weights in ("one", "two"):
        folder = releases.write_sealed(Path(weights), weights=weights.encode())
        uris.append(publish_release(folder, "mini", config.publish))
        registration.register_release("mini", settings, folder, uris[-1])
    assert follow_champion.fn("mini", config, store["to"]) is None
    page(settings).set_registered_model_alias(NAME, "champion", "1")
    assert follow_champion.fn("mini", config, str(tmp_path / "another")) is None
    pointer = follow_champion.fn("mini", config, store["to"])
    assert pointer and pointer.endswith("/mini/channels/champion.json")
    assert find_release("mini@champion", config.publish)[0] == uris[0]
