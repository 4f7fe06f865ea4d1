"""S3 servers that ignore conditions, checksums or encryption: refused by name before anything is lost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.io.remote import Files
from lcmlora.releases.catalog import find_release, list_releases, verify_release
from lcmlora.releases.publish import point_channel, publish_release, yank_release
from lcmlora.releases.stores import s3_probe
from lcmlora.releases.stores.store import open_store
from tests.integration import hostile_s3
from tests.integration.hostile_s3 import Ignorant
from tests.integration.seaweed import SeaweedFS
from tests.support.releases import write_sealed

pytestmark = pytest.mark.integration

SHA = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_sealed(tmp_path / "bundle")


def keys(settings: Publish) -> list[str]:
    client = boto3.Session().client("s3", endpoint_url=settings.endpoint_url, region_name=settings.region)
    listed = client.list_objects_v2(Bucket=settings.to.split("/")[2]).get("Contents", [])
    return sorted(each["Key"] for each in listed)


@pytest.mark.parametrize(
    "ignored",
    [["encryption"], [*hostile_s3.HEADERS]]
    + [pytest.param([name], marks=pytest.mark.slow) for name in ("create", "swap", "checksum")],
)
def test_what_a_server_ignores_is_named_before_anything_is_written(
    s3: SeaweedFS, bucket: Publish, bundle: Path, ignored: list[str]
):
    settings = bucket.model_copy(update={"encryption": "AES256"})
    with Ignorant(s3, *ignored) as relay:
        behind = settings.model_copy(update={"endpoint_url": relay.uri})
        with pytest.raises(UserError) as caught:
            publish_release(bundle, "mini", behind)
        assert str(caught.value).startswith(f"publish.to: bucket {bucket.to.split('/')[2]} at {relay.uri}: ")
        assert str(caught.value).endswith(s3_probe.refusal(ignored)) and "\n" not in str(caught.value)
        assert keys(settings) == ["team/mini/sha256-probe"]
        relay.ignored.clear()  # it was upgraded: the refusal is not remembered
        uri = publish_release(bundle, "mini", behind)
    assert verify_release(uri, settings).files == 8


def test_a_server_that_loses_its_encryption_after_it_was_tried_is_told_by_the_answer_of_the_upload(
    s3: SeaweedFS, bucket: Publish, bundle: Path
):
    with Ignorant(s3) as relay:
        settings = bucket.model_copy(update={"encryption": "AES256", "endpoint_url": relay.uri})
        assert open_store(settings).create("mini/sha256-0123456789ab/a", b"a", hashlib.sha256(b"a").hexdigest())
        relay.ignored.add("x-amz-server-side-encryption")
        message = r"SHA256SUMS: was stored with encryption none, and publish\.encryption asks for AES256; delete it"
        with pytest.raises(UserError, match=message):
            publish_release(bundle, "mini", settings)
    assert not any(key.endswith("safetensors") for key in keys(bucket))


def test_a_shard_of_latents_that_is_stored_in_clear_is_told(
    s3: SeaweedFS, bucket: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("s3fs")
    (tmp_path / "shard").write_bytes(b"latents")
    plain = {"request_checksum_calculation": "when_required"}  # the relay does not take a body with a trailer apart
    asked = {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}, "config_kwargs": plain}
    monkeypatch.setitem(fsspec.config.conf, "s3", asked)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with Ignorant(s3) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.uri)
        files = Files(f"{bucket.to}/shards", "encode.shards")
        files.put(tmp_path / "shard", "a.safetensors")
        relay.ignored.add("x-amz-server-side-encryption")
        message = r"encode\.shards: s3://.*: b\.safetensors was stored with encryption none, expected AES256; delete it"
        with pytest.raises(UserError, match=message):
            files.put(tmp_path / "shard", "b.safetensors")


def test_a_server_is_tried_once_and_no_other_publisher_and_channel_tries_it_again(
    s3: SeaweedFS, bucket: Publish, bundle: Path, tmp_path: Path
):
    with Ignorant(s3) as relay:
        settings = bucket.model_copy(update={"endpoint_url": relay.uri})

        def tried() -> int:
            return sum("probe" in request.line for request in relay.requests)

        uri = publish_release(bundle, "mini", settings)
        first = tried()
        assert first > 0
        other = publish_release(write_sealed(tmp_path / "other", weights=b"better"), "mini", settings)
        point_channel("mini", SHA, settings)
        yank_release(other, settings, reason="worse", who="ann")
        assert tried() == first
        assert find_release("mini@champion", settings) == (uri, SHA)
        assert len(list_releases(settings)) == 2


@pytest.mark.slow
def test_a_server_that_ignores_everything_serves_one_publisher_who_accepts_that(
    s3: SeaweedFS, bucket: Publish, bundle: Path, tmp_path: Path
):
    with Ignorant(s3, "create", "swap", "checksum") as relay:
        settings = bucket.model_copy(update={"endpoint_url": relay.uri, "tolerate": ["create", "swap", "checksum"]})
        uri = publish_release(bundle, "mini", settings)
        point_channel("mini", SHA, settings)
        _works_alone(settings, uri, tmp_path)


def _works_alone(settings: Publish, uri: str, tmp_path: Path) -> None:
    """One publisher at a time never overwrites what is there, and damaged uploads are noticed."""
    assert verify_release(uri, settings).files == 8
    store = open_store(settings)
    name = f"mini/sha256-{SHA[:12]}/SHA256SUMS"
    before = store.read(name)
    assert store.create(name, b"other", hashlib.sha256(b"other").hexdigest()) is False
    pointer = store.read("mini/channels/champion.json")
    assert pointer and store.swap("mini/channels/champion.json", b"{}", '"0"') is False
    assert store.swap("mini/channels/champion.json", b"{}", None) is False
    assert (store.read(name), store.read("mini/channels/champion.json")) == (before, pointer)
    better = hashlib.sha256(b"better").hexdigest()
    publish_release(write_sealed(tmp_path / "better", weights=b"better"), "mini", settings)
    point_channel("mini", better, settings)
    assert find_release("mini@champion", settings)[1] == better
    store.create("mini/sha256-0123456789ab/damaged", b"content", hashlib.sha256(b"other").hexdigest())
    assert store.digest("mini/sha256-0123456789ab/damaged") == hashlib.sha256(b"content").hexdigest()


@pytest.fixture(params=["rclone", "moto"])
def peer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publish]:
    """A server of others that accepts what it should refuse, and which settings name it with what it lacks."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-this-test")
    (tmp_path / "data").mkdir()
    peers = {"rclone": lambda f: hostile_s3.rclone(f, "access", "secret-of-this-test"), "moto": hostile_s3.moto}
    with peers[request.param](tmp_path / "data") as uri:
        if uri is None:
            pytest.skip(f"no {request.param} on this machine")
        boto3.Session().client("s3", endpoint_url=uri, region_name="us-east-1").create_bucket(Bucket="models")
        yield Publish(to="s3://models/team", endpoint_url=uri, region="us-east-1")


def test_rclone_and_moto_are_refused_by_name_and_serve_one_publisher_who_accepts_that(
    peer: Publish, bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    lacking = {"rclone": ["create", "swap", "checksum"], "moto": ["checksum"]}[request.node.callspec.params["peer"]]
    with pytest.raises(UserError) as caught:
        publish_release(bundle, "mini", peer)
    assert str(caught.value).endswith(s3_probe.refusal(lacking))
    assert keys(peer) == ["team/mini/sha256-probe"]
    accepted = peer.model_copy(update={"tolerate": lacking})
    uri = publish_release(bundle, "mini", accepted)
    point_channel("mini", SHA, accepted)
    _works_alone(accepted, uri, tmp_path)
