"""What is concluded from the answers of a server that is tried, and how long it is remembered."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Publish
from lcmlora.releases.stores import s3_probe
from lcmlora.releases.stores.s3_probe import Outcome


class Server:
    """One object, and a server that ignores or does not know some of what it is asked."""

    def __init__(self, ignored: Iterable[str] = (), unknown: Iterable[str] = (), *, present: bool = False) -> None:
        self.ignored, self.unknown = set(ignored), set(unknown)
        self.version = int(present)
        self.before_swap = lambda: None

    def put(self, parameters: dict[str, str]) -> Outcome:
        asked = {"IfNoneMatch": "create", "IfMatch": "swap", "ChecksumSHA256": "checksum"}
        for name in parameters:
            if asked[name] in self.unknown:
                return Outcome("unknown", {})
        self.before_swap()
        wrong = {
            "create": "IfNoneMatch" in parameters and self.version > 0,
            "swap": parameters.get("IfMatch", self.tag) != self.tag,
            "checksum": "ChecksumSHA256" in parameters,
        }
        if any(is_wrong and name not in self.ignored for name, is_wrong in wrong.items()):
            return Outcome("refused", {})
        self.version += 1
        return Outcome("stored", {"ETag": self.tag} | self._encryption)

    def head(self) -> Mapping[str, Any]:
        return {"ETag": self.tag} | self._encryption

    @property
    def tag(self) -> str:
        return f'"{self.version}"'

    @property
    def _encryption(self) -> dict[str, str]:
        return {} if "encryption" in self.ignored else {"ServerSideEncryption": "AES256"}

    def lacking(self) -> set[str]:
        return set(s3_probe.find_lacking(self.put, self.head, "AES256"))


FEATURES = ("create", "swap", "checksum", "encryption")
SUBSETS = [set(each) for count in range(5) for each in itertools.combinations(FEATURES, count)]


def _name(features: set[str]) -> str:
    return "+".join(sorted(features))  # the same in every process that collects the tests


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("ignored", SUBSETS, ids=_name)
def test_a_server_lacks_exactly_what_it_ignores(ignored: set[str], present: bool):
    assert Server(ignored, present=present).lacking() == ignored


@pytest.mark.parametrize("unknown", [each for each in SUBSETS if "encryption" not in each], ids=_name)
def test_a_server_lacks_what_it_says_not_to_know(unknown: set[str]):
    assert Server(unknown=unknown).lacking() == unknown


def test_a_good_server_is_left_as_it_was_but_for_one_swap():
    server = Server(present=True)
    assert server.lacking() == set() and server.version == 2


def test_a_publisher_that_tries_the_server_at_the_same_moment_is_no_fault_of_the_server():
    server = Server(present=True)
    others = iter([1, 1, 1])

    def swapped() -> None:
        server.version += next(others, 0)

    server.before_swap = swapped
    assert server.lacking() == set()


def test_a_server_that_refuses_every_swap_lacks_swaps():
    server = Server(present=True)

    def changed() -> None:
        server.version += 1

    server.before_swap = changed
    assert server.lacking() == {"swap"}


def test_the_object_for_trying_lies_where_the_publisher_writes_and_in_no_release():
    for key, expected in (
        ("team/mini/sha256-0123456789ab/SHA256SUMS", "team/mini/sha256-probe"),
        ("mini/sha256-0123456789ab/yanked.json", "mini/sha256-probe"),
        ("sha256-0123456789ab/yanked.json", "sha256-probe"),
        ("team/mini/channels/champion.json", "team/mini/channels/probe"),
        ("name", "probe"),
    ):
        assert s3_probe.name_for(key) == expected


def test_what_a_server_lacks_is_remembered_for_a_week_for_each_address_and_encryption(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LCMLORA_CACHE", str(tmp_path))
    settings = Publish(to="s3://models", encryption="aws:kms", kms_key="alias/models")

    def recall(endpoint: str = "https://a", bucket: str = "models", using: Publish = settings) -> frozenset[str] | None:
        return s3_probe.recall(endpoint, bucket, using)

    assert recall() is None
    s3_probe.remember("https://a", "models", settings, {"swap"})
    assert recall() == {"swap"}
    assert recall("https://b") is recall("https://a", "other") is recall(using=Publish(to="s3://models")) is None
    (file,) = (tmp_path / "stores").iterdir()
    kept = json.loads(file.read_text())
    for age, expected in ((6.9, {"swap"}), (7.1, None), (-1, None)):
        time = datetime.now(UTC) - timedelta(days=age)
        file.write_text(json.dumps(kept | {"time": time.isoformat()}))
        assert recall() == expected
    for damaged in ("", "[]", '{"time": 3}', "{}"):
        file.write_text(damaged)
        assert recall() is None


def test_a_cache_that_cannot_be_written_only_has_each_process_ask_again(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LCMLORA_CACHE", str(tmp_path / "file"))
    s3_probe.remember("https://a", "models", Publish(), set())
    assert s3_probe.recall("https://a", "models", Publish()) is None


def test_encryption_is_that_of_the_right_key_where_its_name_can_be_compared():
    arn = "arn:aws:kms:eu-west-1:1:key/0a1b"
    answer = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": arn}
    for key in (None, "0a1b", arn, "alias/models", "arn:aws:kms:eu-west-1:1:alias/models"):
        assert s3_probe.is_encrypted(answer, "aws:kms", key)
    assert not s3_probe.is_encrypted(answer, "aws:kms", "ffff")
    assert not s3_probe.is_encrypted({"ServerSideEncryption": "AES256"}, "aws:kms")
    assert not s3_probe.is_encrypted({}, "AES256")
