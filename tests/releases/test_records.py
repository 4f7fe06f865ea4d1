"""Pointers and yank records: signed, of one model, channel, release and time, and never older than what was seen."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("model_signing", reason="no model-signing (extra `signing`) here")

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.releases.catalog import find_release, list_releases, pull_release, verify_release
from lcmlora.releases.publish import point_channel, publish_release, yank_release
from lcmlora.releases.stores.store import open_store
from lcmlora.releases.trust import records, replay_protection
from tests.releases.test_signing import write_keys
from tests.support.releases import write_sealed

OLD, NEW = (hashlib.sha256(each).hexdigest() for each in (b"old", b"new"))
POINTER = "mini/channels/champion.json"


@dataclass(frozen=True)
class Peer:
    """Somebody who can write anything to a store, and has no key."""

    settings: Publish  # of the publisher, who has both keys
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], None]
    delete: Callable[[str], None]

    @property
    def reader(self) -> Publish:
        return self.settings.model_copy(update={"signing_key": None})

    def change(self, name: str, **changes: Any) -> None:
        content = json.loads(self.read(name)) | changes
        self.write(name, json.dumps({key: value for key, value in content.items() if value is not None}).encode())


def yank_of(sha256: str) -> str:
    return f"mini/sha256-{sha256[:12]}/yanked.json"


def directory(settings: Publish) -> Peer:
    root = Path(settings.to)
    return Peer(
        settings,
        read=lambda name: (root / name).read_bytes(),
        write=lambda name, content: (_parent(root / name).write_bytes(content), None)[1],
        delete=lambda name: (root / name).unlink(),
    )


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(replay_protection.STATE, str(tmp_path / "state"))
    return tmp_path / "state" / "seen"


@pytest.fixture
def peer(tmp_path: Path) -> Peer:
    """A store with two signed releases, the champion being the new one, as a reader has seen."""
    private, public = write_keys(tmp_path, "ours")
    made = directory(Publish(to=str(tmp_path / "releases"), signing_key=private, verify_key=public))
    fill(made, tmp_path)
    return made


def fill(peer: Peer, folder: Path) -> None:
    for content in (b"old", b"new"):
        publish_release(write_sealed(folder / content.decode(), weights=content), "mini", peer.settings)


def refused(peer: Peer, message: str, name: str = "mini@champion") -> None:
    with pytest.raises(UserError, match=message) as caught:
        find_release(name, peer.reader)
    assert "\n" not in str(caught.value)


def attempts(peer: Peer, folder: Path) -> Iterator[str]:
    """What a peer can do with pointers; yields after each, with the store as it was before the next."""
    point_channel("mini", OLD, peer.settings)
    old = peer.read(POINTER)
    assert find_release("mini@champion", peer.reader)[1] == OLD
    point_channel("mini", NEW, peer.settings)
    new = peer.read(POINTER)
    assert find_release("mini@champion", peer.reader)[1] == NEW

    peer.write(POINTER, old)
    refused(peer, r"champion\.json: is of 20.* names .* was seen here before; an older one was put back")
    yield "replayed"
    peer.write(POINTER, new)
    assert find_release("mini@champion", peer.reader)[1] == NEW

    for changes in (
        {"sha256": OLD},
        {"time": "2026-01-01T00:00:00Z"},
        {"time": datetime.now(UTC).isoformat()},
        {"release": "s3://elsewhere"},
        {"more": "facts"},
        {"signature": json.loads(old)["signature"]},
        {"signature": json.loads(peer.read(f"mini/sha256-{NEW[:12]}/SHA256SUMS.sig"))},
        {"signature": {}},
        {"signature": "none"},
        {"signature": [1]},
    ):
        peer.change(POINTER, **changes)
        refused(peer, r"champion\.json: is no signature of its pointer by the key of .*ours\.pub")
        peer.write(POINTER, new)
    yield "changed"

    peer.change(POINTER, signature=None)
    refused(peer, r"champion\.json: is not signed, and publish\.verify_key asks for it; run `lcmlora registry promote")
    peer.write(POINTER, json.dumps({"model": "mini", "sha256": OLD}).encode())
    refused(peer, r"champion\.json: is not signed")
    peer.write(POINTER, new)
    yield "unsigned"

    private, public = write_keys(folder, "theirs")
    facts = {key: value for key, value in json.loads(new).items() if key != "signature"}
    peer.write(POINTER, records.serialize_record(records.POINTER, facts, private))
    refused(peer, r"champion\.json: is no signature of its pointer")
    theirs = peer.settings.model_copy(update={"signing_key": private, "verify_key": public})
    with pytest.raises(UserError, match=r"SHA256SUMS\.sig: is no signature"):
        point_channel("mini", NEW, theirs)
    peer.write(POINTER, new)
    yield "by another key"

    peer.write("mini/channels/stable.json", new)
    refused(peer, r"stable\.json: is the pointer of mini@champion, expected that of mini@stable", "mini@stable")
    for other in ("Mini", "maxi"):
        peer.write(f"{other}/channels/champion.json", new)
        refused(peer, rf"{other}/channels/champion\.json: is the pointer of mini@champion", f"{other}@champion")
        peer.delete(f"{other}/channels/champion.json")
    peer.delete("mini/channels/stable.json")
    yield "of another channel or model"

    for sha256 in (OLD, NEW):
        ahead = facts | {"time": (datetime.now(UTC) + timedelta(hours=1)).isoformat(), "sha256": sha256}
        peer.write(POINTER, records.serialize_record(records.POINTER, ahead, peer.settings.signing_key))
        refused(peer, r"champion\.json: is of .*, and here it is .* now; set the clock that is wrong")
        # The publisher's clock was put right: what it writes now is taken.
        point_channel("mini", NEW, peer.settings)
        assert find_release("mini@champion", peer.reader)[1] == NEW
    yield "in the future"

    # On purpose: a new pointer at the old release.
    point_channel("mini", OLD, peer.settings)
    assert find_release("mini@champion", peer.reader)[1] == OLD
    peer.write(POINTER, new)
    refused(peer, "an older one was put back")
    yield "rolled back on purpose"


ATTEMPTS = ["replayed", "changed", "unsigned", "by another key", "of another channel or model", "in the future"]


def test_a_pointer_that_is_older_changed_anothers_or_of_the_future_is_refused(peer: Peer, tmp_path: Path):
    assert list(attempts(peer, tmp_path)) == [*ATTEMPTS, "rolled back on purpose"]


def yanks(peer: Peer) -> Iterator[str]:
    """What a peer can do with a yank record."""
    point_channel("mini", NEW, peer.settings)
    name = f"mini/sha256-{OLD[:12]}"
    yank_release(name, peer.settings, reason="six fingers", who="ann")
    content = peer.read(yank_of(OLD))
    refused(peer, r"was yanked by ann on 20.*: six fingers; take another", name)

    peer.delete(yank_of(OLD))
    refused(peer, r"was yanked by ann .*six fingers \(the record has gone from the store; .* remembers it\)", name)
    (row,) = [row for row in list_releases(peer.reader) if row.sha256 == OLD]
    assert row.yanked and "has gone from the store" in row.yanked.reason
    yield "deleted"

    peer.write(yank_of(NEW), content)
    refused(peer, r"was yanked by ann .* \(.*yanked\.json: is the record of another release\)", "mini@champion")
    peer.delete(yank_of(NEW))
    yield "of another release"

    for changes in ({"reason": "none"}, {"time": "2026-01-01T00:00:00Z"}, {"signature": {}}):
        peer.write(yank_of(OLD), content)
        peer.change(yank_of(OLD), **changes)
        refused(peer, r"was yanked by ann .* \(.*yanked\.json: is no signature of its yank by the key", name)
    peer.change(yank_of(OLD), signature=None)
    refused(peer, r"was yanked by ann .* \(.*yanked\.json: is not signed.*; yank it again where", name)
    yield "changed"


def test_a_yank_stays_although_its_record_is_deleted_or_changed(peer: Peer, tmp_path: Path):
    assert list(yanks(peer)) == ["deleted", "of another release", "changed"]
    # By who wants it all the same.
    assert pull_release(f"mini/sha256-{OLD[:12]}", peer.reader, tmp_path / "out", yanked=True)


def test_an_unsigned_pointer_and_an_unsigned_yank_are_signed_by_writing_them_again(peer: Peer):
    unsigned = peer.settings.model_copy(update={"signing_key": None, "verify_key": None})
    point_channel("mini", NEW, unsigned)
    yank_release(f"mini/sha256-{OLD[:12]}", unsigned, reason="six fingers", who="ann")
    refused(peer, r"champion\.json: is not signed")
    refused(peer, r"yanked\.json: is not signed", f"mini/sha256-{OLD[:12]}")
    before = json.loads(peer.read(yank_of(OLD)))

    point_channel("mini", NEW, peer.settings)
    yank_release(f"mini/sha256-{OLD[:12]}", peer.settings, reason="six fingers", who="ann")
    assert find_release("mini@champion", peer.reader)[1] == NEW
    assert json.loads(peer.read(yank_of(OLD))).items() > before.items()
    found = verify_release(f"mini/sha256-{OLD[:12]}", peer.reader)
    assert found.yanked == records.Yank(before["reason"], before["who"], before["time"])


def test_a_pointer_as_older_versions_wrote_it_is_taken_where_no_key_is_asked_for(peer: Peer):
    plain = peer.settings.model_copy(update={"signing_key": None, "verify_key": None})
    peer.write(POINTER, json.dumps({"model": "mini", "sha256": OLD, "release": "file:///gone"}).encode())
    assert find_release("mini@champion", plain)[1] == OLD
    peer.write(POINTER, json.dumps({"model": "mini", "sha256": OLD, "channel": "stable"}).encode())
    with pytest.raises(UserError, match="is the pointer of mini@stable, expected that of mini@champion"):
        find_release("mini@champion", plain)


def test_who_publishes_has_seen_what_was_published(peer: Peer):
    point_channel("mini", OLD, peer.settings)
    old = peer.read(POINTER)
    point_channel("mini", NEW, peer.settings)
    newer = peer.read(POINTER)
    peer.write(POINTER, old)
    refused(peer, "an older one was put back")
    point_channel("mini", OLD, peer.settings)  # which the pointer names, and readers refuse
    assert peer.read(POINTER) not in (old, newer)
    assert find_release("mini@champion", peer.reader)[1] == OLD
    peer.delete(POINTER)
    point_channel("mini", NEW, peer.settings)
    assert find_release("mini@champion", peer.reader)[1] == NEW
    yank_release(f"mini/sha256-{OLD[:12]}", peer.settings, reason="six fingers", who="ann")
    peer.delete(yank_of(OLD))
    refused(peer, r"was yanked by ann .* \(the record has gone from the store", f"mini/sha256-{OLD[:12]}")


def test_a_list_shows_no_channel_whose_pointer_is_not_signed(peer: Peer, capsys: pytest.CaptureFixture[str]):
    point_channel("mini", NEW, peer.settings)
    assert {row.sha256: row.channels for row in list_releases(peer.reader)} == {OLD: (), NEW: ("champion",)}
    peer.change(POINTER, sha256=OLD)
    assert {row.channels for row in list_releases(peer.reader)} == {()}
    assert "champion.json: is no signature of its pointer" in capsys.readouterr().err


def test_pointing_again_writes_nothing_and_a_signed_pointer_needs_a_key(peer: Peer):
    point_channel("mini", NEW, peer.settings)
    before = peer.read(POINTER)
    point_channel("mini", NEW, peer.settings)
    assert peer.read(POINTER) == before
    with pytest.raises(UserError, match=r"champion\.json: is signed, and publish\.signing_key is not set"):
        point_channel("mini", OLD, peer.reader)
    assert peer.read(POINTER) == before


def test_times_of_pointers_go_up_although_the_clock_of_the_last_publisher_was_ahead(peer: Peer):
    point_channel("mini", OLD, peer.settings)
    facts = {key: value for key, value in json.loads(peer.read(POINTER)).items() if key != "signature"}
    ahead = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    peer.write(POINTER, records.serialize_record(records.POINTER, facts | {"time": ahead}, peer.settings.signing_key))
    assert find_release("mini@champion", peer.reader)[1] == OLD
    point_channel("mini", NEW, peer.settings)
    assert json.loads(peer.read(POINTER))["time"] > ahead
    assert find_release("mini@champion", peer.reader)[1] == NEW


def test_the_model_of_a_release_is_that_of_its_provenance(peer: Peer, tmp_path: Path):
    prefix = f"mini/sha256-{NEW[:12]}"
    bundle = write_sealed(tmp_path / "maxi", weights=b"new", model="maxi")
    with pytest.raises(UserError, match=r"provenance\.json: model: is 'maxi', expected 'mini'"):
        publish_release(bundle, "mini", peer.settings)
    peer.change(f"{prefix}/manifest.json", model="maxi")
    refused(peer, r"provenance\.json: is a release of mini, and manifest\.json says maxi", prefix)
    peer.change(f"{prefix}/manifest.json", model="mini")
    assert find_release(prefix, peer.reader)[1] == NEW
    # Signed by the right key, and moved below another model, whose users would take it for theirs.
    root = Path(peer.settings.to)
    for other in ("maxi", "Mini"):
        shutil.copytree(root / prefix, root / other / f"sha256-{NEW[:12]}")
        for manifest in ("mini", other):
            peer.change(f"{other}/sha256-{NEW[:12]}/manifest.json", model=manifest)
            refused(peer, rf"provenance\.json: is a release of mini, and .* {other}; it was", f"{other}/sha256-{NEW}")
            with pytest.raises(UserError, match=r"expected|is a release of mini"):
                point_channel(other, NEW, peer.settings)


def test_what_was_seen_is_kept_for_each_store_model_and_channel(peer: Peer, tmp_path: Path, memory: Path):
    point_channel("mini", OLD, peer.settings)
    point_channel("mini", NEW, peer.settings, "stable")
    mirror = peer.reader.model_copy(update={"to": str(tmp_path / "mirror")})
    shutil.copytree(peer.settings.to, mirror.to)
    point_channel("mini", NEW, peer.settings)
    for settings, expected in ((peer.reader, NEW), (mirror, OLD)):
        assert find_release("mini@champion", settings)[1] == expected
        assert find_release("mini@stable", settings)[1] == NEW
    assert len(list(memory.glob("*.json"))) == 4


def test_a_memory_that_is_damaged_or_cannot_be_kept_is_told(
    peer: Peer, memory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    point_channel("mini", NEW, peer.settings)
    find_release("mini@champion", peer.reader)
    (note,) = memory.glob("*.json")
    for content in (b"", b"[", b'{"time": 3}', b"\xff"):
        note.write_bytes(content)
        refused(peer, rf"{note}: ")
    monkeypatch.setenv(replay_protection.STATE, str(note))  # no folder
    assert find_release("mini@champion", peer.reader)[1] == NEW
    assert "an older pointer or a yank that was deleted is not noticed" in capsys.readouterr().err


def test_names_that_lead_elsewhere_are_refused(peer: Peer):
    for name in ("..@champion", "mini@..", ".@x", "a b@champion", "mini\x1b[31m@champion", "é@champion"):
        refused(peer, "is not the name of a model or channel", name)
    with pytest.raises(UserError, match=r"expected a pointer's address, \.\.\./MODEL/channels/CHANNEL\.json"):
        find_release(f"{open_store(peer.reader).uri}/mini/champion.json", peer.reader)
