"""Backup and restore of a project whose registry is an sqlite file and whose releases are a folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lcmlora import config, registry
from lcmlora.config import Registry
from lcmlora.errors import UserError
from lcmlora.flows.backup import archive, databases, making, restoring
from lcmlora.flows.backup.archive import Manifest
from lcmlora.registry import promotion, registration
from lcmlora.releases import publish
from tests.support.registries import fresh
from tests.support.releases import settings as raw_settings
from tests.support.releases import write_sealed

PREFECT = """
CREATE TABLE concurrency_limit_v2 (name TEXT, active_slots INTEGER);
INSERT INTO concurrency_limit_v2 VALUES ('gpu', 1);
CREATE TABLE flow_run (id TEXT, state_id TEXT, state_type TEXT, state_name TEXT);
CREATE TABLE flow_run_state (id TEXT, type TEXT, name TEXT, message TEXT);
INSERT INTO flow_run VALUES ('a', '1', 'RUNNING', 'Running'), ('b', '2', 'COMPLETED', 'UpToDate');
INSERT INTO flow_run_state VALUES ('1', 'RUNNING', 'Running', ''), ('2', 'COMPLETED', 'UpToDate', '');
"""


@pytest.fixture
def project(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> Path:
    """A project with a champion in registry and store, and a folder .up/ with a database that is written to."""
    root = tmp_path / "my project"
    (root / ".up/prefect/concurrency_leases").mkdir(parents=True)
    raw = raw_settings(base_folder, registry={"tracking_uri": "sqlite:///mlflow.db"}, publish={"to": "releases"})
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    (root / ".gitignore").write_text("/.up/\n/mlflow.db\n/mlruns/\n/releases/\n")
    for arguments in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=root, check=True)
    monkeypatch.chdir(root)
    for name in ("MLFLOW_TRACKING_URI", "LCMLORA_PUBLISH_TO"):
        monkeypatch.delenv(name, raising=False)
    fresh(root, tmp_path_factory)
    settings = config.load(root / "params.yaml", root)
    sealed = write_sealed(tmp_path / "release")
    uri = publish.publish_release(sealed, "mini", settings.publish)
    version = registration.register_release("mini", registry_of(root), sealed, uri)
    promotion.promote_passed(version, registry_of(root), reason="first")
    publish.point_channel("mini", version.sha256, settings.publish)
    mirror = (root / "mirror/mini/sha256-1").as_uri()
    registration.register_release("mini", registry_of(root), sealed, uri, others=[mirror])
    (root / ".up/state.json").write_text(json.dumps({"secrets": {"mlflow": "a-password"}}))
    (root / ".up/state.json").chmod(0o600)
    (root / ".up/prefect.log").write_text("a log\n")
    (root / ".up/.gitignore").write_text("*\n")
    (root / ".up/prefect/concurrency_leases/1.json").write_text("{}")
    with contextlib.closing(sqlite3.connect(root / ".up/prefect/prefect.db")) as prefect:
        prefect.executescript(PREFECT)
    return root


def registry_of(root: Path) -> Registry:
    """Returns the project's registry by its absolute address: MLflow keeps a relative one open for the next test."""
    return Registry(tracking_uri=f"sqlite:///{root}/mlflow.db", experiment="lcmlora", alias="champion")


@contextlib.contextmanager
def no_store() -> Iterator[None]:
    raise AssertionError("there are no objects")
    yield


def backup(project: Path, target: Path) -> tuple[Path, Manifest]:
    return making.make(project, config.load(project / "params.yaml", project), target, "mine", None)


def restore(backup: Path, root: Path) -> None:
    manifest = archive.read(backup)
    archive.check(backup, manifest)
    (root / ".up").mkdir(parents=True, exist_ok=True)
    (root / ".up/.gitignore").write_text("*\n")  # as by `stack.locked_folder`
    restoring.restore(backup, manifest, root, no_store)  # type: ignore[arg-type]


def test_a_backup_in_an_empty_folder_elsewhere_has_champion_channel_history_and_passwords(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with contextlib.closing(sqlite3.connect(project / ".up/prefect/prefect.db")) as writer:
        writer.execute("PRAGMA journal_mode = WAL")  # as Prefect's server does
        with writer:
            writer.execute("INSERT INTO concurrency_limit_v2 VALUES ('in the write-ahead log', 1)")
        place, manifest = backup(project, tmp_path / "backups")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*") if path.is_file()} == {0o600}
    names = set(manifest.files)
    assert {"params.yaml", "mlflow.db", ".up/state.json", ".up/prefect/prefect.db"} <= names
    left_out = {
        ".up/.gitignore",
        ".up/prefect.log",
        ".up/prefect/concurrency_leases/1.json",
        ".up/prefect/prefect.db-wal",
    }
    assert not left_out & names and all((project / name).is_file() for name in names)
    shutil.rmtree(project)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    restore(archive.find(tmp_path / "backups"), elsewhere)
    champion = registry.resolve("mini@champion", registry_of(elsewhere))
    assert champion.version == 1 and champion.release_uri
    assert len(champion.uris) == 2 and all(uri.startswith(f"{elsewhere.as_uri()}/") for uri in champion.uris)
    downloaded = registry.pull("mini@champion", registry_of(elsewhere), tmp_path / "pulled")
    assert (Path(downloaded) / "pytorch_lora_weights.safetensors").read_bytes() == b"weights"
    pointer = json.loads((elsewhere / "releases/mini/channels/champion.json").read_text())
    assert pointer["sha256"] == champion.sha256
    assert json.loads((elsewhere / ".up/state.json").read_text())["secrets"] == {"mlflow": "a-password"}
    assert stat.S_IMODE((elsewhere / ".up/state.json").stat().st_mode) == 0o600
    log = subprocess.run(["git", "log", "--format=%s"], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert log.stdout == "Begin\n"
    status = subprocess.run(["git", "status", "--porcelain"], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert status.stdout == ""
    with contextlib.closing(sqlite3.connect(elsewhere / ".up/prefect/prefect.db")) as prefect:
        rows = "SELECT f.state_type, state_name, s.type, name FROM flow_run f JOIN flow_run_state s ON s.id = state_id"
        assert prefect.execute(rows).fetchall() == [
            ("CRASHED", "Crashed", "CRASHED", "Crashed"),
            ("COMPLETED", "UpToDate", "COMPLETED", "UpToDate"),
        ]
        # A slot that a run had when the backup was made would be taken for ever.
        assert prefect.execute("SELECT name, active_slots FROM concurrency_limit_v2").fetchall() == [
            ("gpu", 0),
            ("in the write-ahead log", 0),
        ]


def test_an_interrupted_restore_goes_on_after_the_postgresql_registry_that_it_has_filled(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place, manifest = backup(project, tmp_path / "backups")
    (place / archive.DUMP).write_bytes(b"a dump")
    filled = manifest.model_copy(
        update={"others": {**manifest.others, archive.DUMP: archive.Content(sha256="", bytes=6)}}
    )
    restored: list[Path] = []
    monkeypatch.setattr(databases, "restore_postgresql", lambda source, uri: restored.append(source))
    target = tmp_path / "target"
    target.mkdir()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(databases, "end_runs", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        restoring.restore(place, filled, target, no_store)
    restoring.restore(place, filled, target, no_store)

    assert restored == [place / archive.DUMP]
    assert not (target / ".up" / restoring.BEGUN).exists()


def test_a_damaged_or_incomplete_backup_is_refused_before_anything_is_written(project: Path, tmp_path: Path):
    place, _ = backup(project, tmp_path / "backups")
    damaged, target = place / "files/.up/state.json", tmp_path / "target"
    target.mkdir()
    before = damaged.read_bytes()
    for change, told in ((lambda: damaged.write_bytes(b"{}"), "is damaged"), (damaged.unlink, "is missing")):
        change()
        with pytest.raises(UserError, match=f"{told}; nothing was restored"):
            restore(place, target)
        damaged.write_bytes(before)
        assert list(target.iterdir()) == []
    (place / archive.MANIFEST).unlink()
    with pytest.raises(UserError, match="is no backup and has none"):
        archive.find(tmp_path / "backups")


def test_a_backup_that_fails_leaves_nothing_that_is_taken_for_one(project: Path, tmp_path: Path):
    (project / "mlflow.db").write_bytes(b"SQLite format 3\0" + b"damaged" * 1000)
    with pytest.raises(UserError, match=r"mlflow\.db: (cannot be copied|is damaged)"):
        backup(project, tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


def test_what_changes_while_it_is_copied_is_copied_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A release and its pointer are written in the middle of the first pass."""
    copy, passes = making._Copier._copy_files, []

    def copy_files(self: making._Copier, found: dict[str, making.Source]) -> None:
        copy(self, found)
        if not passes:
            (project / "releases/mini/channels/champion.json").write_text('{"sha256": "new"}')
            (project / "releases/mini/late").write_text("late")
        passes.append(len(found))

    monkeypatch.setattr(making._Copier, "_copy_files", copy_files)
    place, manifest = backup(project, tmp_path / "backups")
    assert len(passes) == 2
    assert (place / "files/releases/mini/channels/champion.json").read_text() == '{"sha256": "new"}'
    assert "releases/mini/late" in manifest.files
    archive.check(place, manifest)


def test_nothing_is_overwritten_and_an_interrupted_restore_goes_on(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place, _ = backup(project, tmp_path / "backups")
    with pytest.raises(UserError, match=r"and \d+ more: is there already, and nothing is overwritten"):
        restore(place, project)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", project, clone], check=True)
    with (clone / "params.yaml").open("a") as params:
        params.write("# edited since\n")
    monkeypatch.chdir(clone)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(databases, "end_runs", _full_disk)
        restore(place, clone)
    assert (clone / ".up" / restoring.BEGUN).is_file()
    restore(place, clone)
    assert not (clone / ".up" / restoring.BEGUN).exists()
    assert "# edited since" in (clone / "params.yaml").read_text()
    assert registry.resolve("mini@champion", registry_of(clone)).version == 1


def _full_disk(path: Path) -> None:
    raise OSError("disk is full")
