"""What lcmlora 0.1.0 registered in MLflow and published stays readable.

`files/0.1.0.tar.gz` was made by the code of that version: made_by.py in it, in a checkout of 823f7d4. It has a dump of
MLflow's database, the artifacts and a store with three releases, whose weights are words. Version 2 is champion:
version 3, which the gate had rejected, was promoted against it, rolled back and yanked.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tarfile
from pathlib import Path

import pytest

from lcmlora import registry
from lcmlora.config import Publish, Registry
from lcmlora.errors import UserError
from lcmlora.registry import lookup, promotion
from lcmlora.registry.registration import register_release
from lcmlora.releases import bundle, catalog

FILES = Path(__file__).parent / "files" / "0.1.0.tar.gz"
NAME = "lcm-lora-mini"
DIGESTS = [hashlib.sha256(weights).hexdigest() for weights in (b"one", b"two", b"three")]


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the former project."""
    root = tmp_path_factory.mktemp("former")
    with tarfile.open(FILES) as files:
        files.extractall(root, filter="data")
    for file in (root / "mlflow.sql", root / "releases" / "mini" / "channels" / "champion.json"):
        file.write_text(file.read_text().replace("PROJECT", str(root)))  # which stands for the project's folder
    with sqlite3.connect(root / "mlflow.db") as database:
        database.executescript((root / "mlflow.sql").read_text())
    return root


@pytest.fixture
def settings(former: Path) -> Registry:
    return Registry(tracking_uri=f"sqlite:///{former / 'mlflow.db'}")


@pytest.fixture
def store(former: Path) -> Publish:
    return Publish(to=str(former / "releases"))


def test_versions_are_found_by_alias_number_and_digest(settings: Registry):
    found = registry.versions(settings, NAME)
    assert [(each.version, each.sha256) for each in found] == [
        (3, DIGESTS[2]),
        (2, DIGESTS[1]),
        (1, DIGESTS[0]),
    ]
    for reference in (f"{NAME}@champion", f"{NAME}/2", DIGESTS[1], DIGESTS[1][:12]):
        assert lookup.resolve(reference, settings) == found[1]
    champion = lookup.champion("mini", settings)
    assert champion == found[1] and champion is not None
    assert (champion.aliases, champion.gate, champion.trained) == (("champion",), "passed", DIGESTS[1])


def test_tags_that_0_1_0_did_not_write_are_known_to_be_missing(settings: Registry):
    version = lookup.resolve(f"{NAME}/1", settings)
    assert version.base == {"source": "bases/mini", "revision": None, "digest": "b" * 64}  # of the UNet alone
    assert "adapter" not in version.tags and version.figure("excess.student_4") == 4.5
    assert (version.data_digest, version.git_commit, version.objective) == ("d" * 64, "c" * 40, "tcd")
    assert (version.data_dvc, version.dvc_lock) == ("5f" * 16 + ".dir", "77aa" * 16)
    rejected = lookup.resolve(f"{NAME}/3", settings)
    assert (rejected.gate, rejected.gate_reason) == ("rejected", "excess 9 is above 8")


def test_the_history_of_champions_goes_on(settings: Registry):
    told = [(each.action, each.version, each.who) for each in promotion.history(NAME, settings) if each.alias]
    assert [action for action, *_ in told] == ["promoted", "promoted", "promoted", "rolled back"]
    assert [version for _, version, _ in told] == [1, 2, 3, 2]
    assert (told[0][2], told[3][2]) == ("ada", "bob")
    assert promotion.foreign_events(NAME, settings) == []


def test_the_adapter_and_the_figures_of_a_version_are_downloaded_and_checked(settings: Registry, tmp_path: Path):
    folder = registry.pull(f"{NAME}@champion", settings, tmp_path / "pulled", everything=True)
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == b"two"
    assert bundle.digest(folder) == DIGESTS[1]
    figures = registry.figures(lookup.resolve(f"{NAME}/2", settings), settings)
    assert list(figures.students) == ["student@2", "student@4"]
    assert bundle.Provenance.read(folder / bundle.PROVENANCE).model == "mini"
    same = lookup.compare(lookup.resolve(f"{NAME}/1", settings), lookup.resolve(f"{NAME}/2", settings))
    assert next(each.change for each in same if each.figure.endswith("excess.student_4")) == -1.0


def test_a_release_that_0_1_0_registered_is_not_registered_again(settings: Registry, tmp_path: Path):
    folder = registry.pull(f"{NAME}/1", settings, tmp_path / "pulled", everything=True)
    again = register_release("mini", settings, folder)
    assert (again.version, again.created, again.promoted) == (1, False, True)


def test_published_releases_are_listed_with_their_channel_and_what_was_yanked(store: Publish):
    found = {each.sha256: each for each in catalog.list_releases(store)}
    assert found.keys() == {*DIGESTS} and all(each.whole and each.fault is None for each in found.values())
    assert [found[digest].channels for digest in DIGESTS] == [(), ("champion",), ()]
    yanked = found[DIGESTS[2]].yanked
    assert yanked is not None and yanked.reason == "trained on withdrawn pictures"


def test_a_published_release_is_pulled_by_its_channel_and_verified(store: Publish, tmp_path: Path):
    folder = catalog.pull_release("mini@champion", store, tmp_path / "pulled")
    assert bundle.digest(folder) == DIGESTS[1]
    verified = catalog.verify_release("mini@champion", store)
    assert (verified.model, verified.sha256, verified.packaged) == ("mini", DIGESTS[1], None)
    with pytest.raises(UserError, match="trained on withdrawn pictures"):
        catalog.pull_release(f"mini/sha256-{DIGESTS[2][:12]}", store, tmp_path / "yanked")
