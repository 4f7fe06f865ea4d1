"""Publishing to a real S3 server."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lcmlora.config import Publish
from lcmlora.errors import Unavailable, UserError
from lcmlora.registry.references import Places, open_adapter
from lcmlora.releases.catalog import find_release, list_releases, presigned_links, pull_release, verify_release
from lcmlora.releases.publish import point_channel, publish_release, yank_release
from lcmlora.releases.stores.s3 import S3Store
from lcmlora.releases.stores.store import open_store
from tests.integration.seaweed import SeaweedFS, free_ports
from tests.support.releases import load_settings, write_sealed

pytestmark = pytest.mark.integration

SHA = hashlib.sha256(b"weights").hexdigest()
PREFIX = f"team/mini/sha256-{SHA[:12]}"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_sealed(tmp_path / "bundle")


def name_of(settings: Publish) -> str:
    return settings.to.split("/")[2]


def objects(s3: SeaweedFS, settings: Publish) -> dict[str, str]:
    """Returns name -> ETag and time, without the object by which the server was tried."""
    listed = s3.client().list_objects_v2(Bucket=name_of(settings)).get("Contents", [])
    return {e["Key"]: f"{e['ETag']} {e['LastModified']}" for e in listed if not e["Key"].endswith("probe")}


def test_a_release_is_published_whole_and_the_server_knows_every_sha256(s3: SeaweedFS, bucket: Publish, bundle: Path):
    assert publish_release(bundle, "mini", bucket) == f"{bucket.to}/mini/sha256-{SHA[:12]}"
    client = s3.client()
    manifest = json.loads(client.get_object(Bucket=name_of(bucket), Key=f"{PREFIX}/manifest.json")["Body"].read())
    assert manifest["sha256"] == SHA
    assert len(manifest["files"]) == 7
    assert len(objects(s3, bucket)) == 8
    store = open_store(bucket)
    for file in manifest["files"]:
        content = client.get_object(Bucket=name_of(bucket), Key=f"{PREFIX}/{file['name']}")["Body"].read()
        assert content == (bundle / file["name"]).read_bytes()
        assert store.digest(f"mini/sha256-{SHA[:12]}/{file['name']}") == file["sha256"]


def test_publishing_again_writes_nothing(s3: SeaweedFS, bucket: Publish, bundle: Path):
    first = publish_release(bundle, "mini", bucket)
    before = objects(s3, bucket)
    assert publish_release(bundle, "mini", bucket) == first
    assert objects(s3, bucket) == before


def test_a_release_without_manifest_is_completed_by_the_next_run(s3: SeaweedFS, bucket: Publish, bundle: Path):
    publish_release(bundle, "mini", bucket)
    for name in ("manifest.json", "README.md"):
        s3.client().delete_object(Bucket=name_of(bucket), Key=f"{PREFIX}/{name}")
    with pytest.raises(UserError, match=r"no manifest\.json, so no release"):
        point_channel("mini", SHA, bucket)
    kept = objects(s3, bucket)
    publish_release(bundle, "mini", bucket)
    after = objects(s3, bucket)
    assert len(kept) == 6
    assert len(after) == 8
    assert {name: after[name] for name in kept} == kept


def test_different_files_under_a_half_published_prefix_are_refused(
    s3: SeaweedFS, bucket: Publish, bundle: Path, tmp_path: Path
):
    publish_release(bundle, "mini", bucket)
    s3.client().delete_object(Bucket=name_of(bucket), Key=f"{PREFIX}/manifest.json")
    before = objects(s3, bucket)
    with pytest.raises(UserError, match=r"SHA256SUMS: holds sha256 .* delete the prefix"):
        publish_release(write_sealed(tmp_path / "other", card="another publisher's\n"), "mini", bucket)
    assert objects(s3, bucket) == before


def test_publishers_of_the_same_release_at_the_same_moment_all_succeed(s3: SeaweedFS, bucket: Publish, bundle: Path):
    with ThreadPoolExecutor(4) as pool:
        uris = set(pool.map(lambda _: publish_release(bundle, "mini", bucket), range(4)))
    assert len(uris) == 1
    assert len(objects(s3, bucket)) == 8


def test_bytes_that_do_not_match_their_sha256_are_refused_by_the_server(s3: SeaweedFS, bucket: Publish):
    with pytest.raises(UserError, match=r"publish\.to: bucket .*: (BadDigest|XAmzContentChecksumMismatch)"):
        open_store(bucket).create("name", b"content", hashlib.sha256(b"other").hexdigest())
    assert objects(s3, bucket) == {}


def test_an_object_of_another_tool_without_checksum_is_hashed_by_reading_it(s3: SeaweedFS, bucket: Publish):
    s3.client().put_object(Bucket=name_of(bucket), Key="team/plain", Body=b"plain")
    assert open_store(bucket).digest("plain") == hashlib.sha256(b"plain").hexdigest()


def test_the_channel_follows_and_a_stale_pointer_is_not_overwritten(bucket: Publish, bundle: Path, tmp_path: Path):
    publish_release(bundle, "mini", bucket)
    uri = publish_release(write_sealed(tmp_path / "other", weights=b"better"), "mini", bucket)
    assert point_channel("mini", SHA, bucket) == f"{bucket.to}/mini/channels/champion.json"
    store = open_store(bucket)
    _, tag = store.read("mini/channels/champion.json") or (b"", "")
    point_channel("mini", hashlib.sha256(b"better").hexdigest(), bucket)
    pointer = store.read("mini/channels/champion.json") or (b"", "")
    assert json.loads(pointer[0])["release"] == uri
    assert store.swap("mini/channels/champion.json", b"{}", tag) is False
    assert store.swap("mini/channels/champion.json", b"{}", None) is False
    assert store.read("mini/channels/champion.json") == pointer


def test_a_wrong_secret_is_told_with_bucket_and_endpoint_and_without_the_secret(
    s3: SeaweedFS, bucket: Publish, bundle: Path, monkeypatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(UserError, match=f"bucket {name_of(bucket)} at {s3.endpoint}: SignatureDoesNotMatch") as caught:
        publish_release(bundle, "mini", bucket)
    assert "not-the-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert objects(s3, bucket) == {}


def test_an_identity_that_may_only_read_is_told_so(s3: SeaweedFS, bucket: Publish, bundle: Path, monkeypatch):
    access, secret = s3.keys["reader"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(UserError, match=f"bucket {name_of(bucket)} at .*: AccessDenied"):
        publish_release(bundle, "mini", bucket)
    assert objects(s3, bucket) == {}


def test_a_bucket_that_does_not_exist_is_named(s3: SeaweedFS, bucket: Publish, bundle: Path):
    missing = Publish(to="s3://no-such-bucket/team", endpoint_url=s3.endpoint, region="us-east-1")
    with pytest.raises(UserError, match=r"bucket no-such-bucket at .*: NoSuchBucket"):
        publish_release(bundle, "mini", missing)


def test_a_server_that_does_not_answer_is_named_and_the_release_is_kept(bucket: Publish, bundle: Path):
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    settings = Publish(to=bucket.to, endpoint_url=endpoint, region="us-east-1")
    with pytest.raises(Unavailable, match=f"at {endpoint}: Could not connect .*the release is kept"):
        publish_release(bundle, "mini", settings)


def test_missing_credentials_are_told(bucket: Publish, bundle: Path, monkeypatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="Unable to locate credentials"):
        publish_release(bundle, "mini", bucket)


def test_releases_at_the_top_of_a_bucket_have_no_empty_prefix(s3: SeaweedFS, bucket: Publish, bundle: Path):
    settings = bucket.model_copy(update={"to": f"s3://{name_of(bucket)}/"})
    assert isinstance(open_store(settings), S3Store)
    assert publish_release(bundle, "mini", settings) == f"s3://{name_of(bucket)}/mini/sha256-{SHA[:12]}"
    assert f"mini/sha256-{SHA[:12]}/manifest.json" in objects(s3, bucket)


def test_a_published_release_is_an_adapter_by_its_address_and_by_its_channel(
    bucket: Publish, bundle: Path, tmp_path: Path, s3: SeaweedFS
):
    config = load_settings(tmp_path, publish=bucket.model_dump())
    uri = publish_release(bundle, "mini", bucket)
    point_channel("mini", SHA, bucket)
    names = (uri, f"{bucket.to}/mini/channels/champion.json")
    for name in (*names, "mini@champion", f"mini/sha256-{SHA[:12]}", SHA, SHA[:12]):
        found = open_adapter(name, Places(tmp_path / "cache", None, config.publish))
        assert (found.shown, found.model) == (name, "mini")
        assert found.weights == tmp_path / "cache" / f"sha256-{SHA[:12]}" / "pytorch_lora_weights.safetensors"
        assert found.weights.read_bytes() == b"weights"
    for name, message in (
        (f"{bucket.to}/mini/sha256-0", r"sha256-0: holds no manifest\.json, so no release"),
        (f"{bucket.to}/mini/channels/nobody.json", r"nobody\.json: no such pointer"),
        (
            "s3://no-such-bucket/mini",
            r"s3://no-such-bucket/mini: bucket no-such-bucket at .*: NoSuchBucket",
        ),
    ):
        with pytest.raises(UserError, match=message):
            open_adapter(name, Places(tmp_path / "cache", None, config.publish))


def test_a_published_release_of_which_an_object_was_changed_is_not_kept(
    bucket: Publish, bundle: Path, tmp_path: Path, s3: SeaweedFS
):
    config = load_settings(tmp_path, publish=bucket.model_dump())
    uri = publish_release(bundle, "mini", bucket)
    s3.client().put_object(Bucket=name_of(bucket), Key=f"{PREFIX}/grid.png", Body=b"pnG")
    with pytest.raises(UserError, match=r"grid\.png: has 3 bytes, and 73 are listed"):
        open_adapter(uri, Places(tmp_path / "cache", None, config.publish), everything=True)
    assert list((tmp_path / "cache").iterdir()) == []
    s3.client().delete_object(Bucket=name_of(bucket), Key=f"{PREFIX}/grid.png")
    with pytest.raises(UserError, match=r"grid\.png: is listed in manifest\.json and missing"):
        open_adapter(uri, Places(tmp_path / "cache", None, config.publish), everything=True)


def test_every_object_is_encrypted_and_tagged_as_params_say(s3: SeaweedFS, bucket: Publish, bundle: Path):
    settings = bucket.model_copy(update={"encryption": "AES256", "tags": {"team": "a & b", "cost": "7"}})
    publish_release(bundle, "mini", settings)
    point_channel("mini", SHA, settings)
    names = objects(s3, bucket)
    assert len(names) == 9
    for name in names:
        tags = s3.client().get_object_tagging(Bucket=name_of(bucket), Key=name)["TagSet"]
        assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "a & b", "cost": "7"}
        head = s3.client().head_object(Bucket=name_of(bucket), Key=name)
        assert head["ServerSideEncryption"] == "AES256"
    assert verify_release(f"{bucket.to}/mini/sha256-{SHA[:12]}", settings).files == 8


def test_a_release_on_s3_is_found_listed_pulled_and_yanked(bucket: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", bucket)
    other = publish_release(write_sealed(tmp_path / "other", weights=b"better"), "mini", bucket)
    pointer = point_channel("mini", SHA, bucket)
    for name in (uri, pointer, "mini@champion", f"mini/sha256-{SHA[:6]}", f"mini/sha256-{SHA}"):
        assert find_release(name, bucket) == (uri, SHA)
    out = pull_release("mini@champion", bucket, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "SHA256SUMS",
        "provenance.json",
        "pytorch_lora_weights.safetensors",
        "scheduler_config.json",
    ]
    with pytest.raises(UserError, match="champion points to it; roll back first"):
        yank_release(uri, bucket, reason="six fingers", who="ann")
    yank_release(other, bucket, reason="six fingers", who="ann")
    with pytest.raises(UserError, match=r"was yanked by ann on .*: six fingers"):
        pull_release(other, bucket, tmp_path / "none")
    rows = {row.uri: row for row in list_releases(bucket)}
    assert (rows[uri].channels, rows[uri].files, rows[uri].whole) == (("champion",), 8, True)
    yank = rows[other].yanked
    assert yank is not None and yank.reason == "six fingers"


def test_links_need_no_key_and_end(s3: SeaweedFS, bucket: Publish, bundle: Path):
    import time
    import urllib.error
    import urllib.request

    uri = publish_release(bundle, "mini", bucket)
    found = presigned_links(uri, bucket, 60)
    assert found.keys() == {path.name for path in bundle.iterdir()} | {"manifest.json"}
    assert all("writer-secret" not in link and "X-Amz-Expires=60" in link for link in found.values())
    for name in ("pytorch_lora_weights.safetensors", "SHA256SUMS"):
        with urllib.request.urlopen(found[name]) as answer:
            assert answer.read() == (bundle / name).read_bytes()
    short = presigned_links(uri, bucket, 1)["SHA256SUMS"]
    time.sleep(2.5)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(short)
    assert caught.value.code == 403


def test_an_endpoint_that_holds_a_password_is_refused_without_showing_it(bucket: Publish, bundle: Path):
    settings = bucket.model_copy(update={"endpoint_url": "http://user:MARKED-SECRET-1@127.0.0.1:1"})
    with pytest.raises(UserError, match=r"publish\.endpoint_url: holds a user or a password") as caught:
        publish_release(bundle, "mini", settings)
    assert "MARKED-SECRET-1" not in str(caught.value)
