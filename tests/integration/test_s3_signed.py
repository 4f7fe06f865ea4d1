"""Signed pointers and yank records on a real S3 server, against somebody who can write to the bucket and has no key."""

from pathlib import Path

import pytest

pytest.importorskip("model_signing", reason="no model-signing (extra `signing`) here")

from lcmlora.config import Publish
from lcmlora.releases.catalog import pull_release
from lcmlora.releases.trust import replay_protection
from tests.integration.seaweed import SeaweedFS
from tests.releases import test_records
from tests.releases.test_records import OLD, Peer
from tests.releases.test_signing import write_keys

pytestmark = pytest.mark.integration


@pytest.fixture
def peer(s3: SeaweedFS, bucket: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    monkeypatch.setenv(replay_protection.STATE, str(tmp_path / "state"))
    private, public = write_keys(tmp_path, "ours")
    client, name = s3.client(), bucket.to.split("/")[2]
    made = Peer(
        bucket.model_copy(update={"signing_key": private, "verify_key": public}),
        read=lambda key: client.get_object(Bucket=name, Key=f"team/{key}")["Body"].read(),
        write=lambda key, content: client.put_object(Bucket=name, Key=f"team/{key}", Body=content),
        delete=lambda key: client.delete_object(Bucket=name, Key=f"team/{key}"),
    )
    test_records.fill(made, tmp_path)
    return made


@pytest.mark.slow
def test_a_pointer_that_is_older_changed_anothers_or_of_the_future_is_refused(peer: Peer, tmp_path: Path):
    assert list(test_records.attempts(peer, tmp_path)) == [*test_records.ATTEMPTS, "rolled back on purpose"]


@pytest.mark.slow
def test_a_yank_stays_although_its_record_is_deleted_or_changed(peer: Peer, tmp_path: Path):
    assert list(test_records.yanks(peer)) == ["deleted", "of another release", "changed"]
    assert pull_release(f"mini/sha256-{OLD[:12]}", peer.reader, tmp_path / "out", yanked=True)
