"""Signed releases, with real keys: who signed them, and what is refused."""

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("model_signing", reason="no model-signing (extra `signing`) here")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.releases.catalog import download_release, find_release, list_releases, pull_release, verify_release
from lcmlora.releases.publish import publish_release
from lcmlora.releases.trust.signing import check, sign
from tests.support.releases import write_sealed

SHA = hashlib.sha256(b"weights").hexdigest()
PREFIX = f"mini/sha256-{SHA[:12]}"


def write_keys(folder: Path, name: str, *, curve: ec.EllipticCurve | None = None) -> tuple[str, str]:
    """Writes NAME.pem and NAME.pub, and returns their paths."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return str(private), str(public)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    return write_keys(tmp_path, "ours")


@pytest.fixture
def settings(tmp_path: Path, keys: tuple[str, str]) -> Publish:
    return Publish(to=str(tmp_path / "releases"), signing_key=keys[0], verify_key=keys[1])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_sealed(tmp_path / "bundle")


def test_a_signed_release_is_verified_by_its_key(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings)
    assert verify_release(uri, settings).signature == "valid"
    assert verify_release(uri, settings.model_copy(update={"verify_key": None})).signature == "unchecked"
    assert [row.signed for row in list_releases(settings)] == [True]
    out = pull_release(uri, settings, tmp_path / "out")
    signature = (out / "SHA256SUMS.sig").read_bytes()
    assert signature == (Path(settings.to) / PREFIX / "SHA256SUMS.sig").read_bytes()
    assert pull_release(uri, settings, out) == out
    check((out / "SHA256SUMS").read_bytes(), signature, str(settings.verify_key), "here")


def test_publishing_again_keeps_the_signature_that_is_there(settings: Publish, bundle: Path):
    publish_release(bundle, "mini", settings)
    path = Path(settings.to) / PREFIX / "SHA256SUMS.sig"
    first = path.read_bytes()
    assert sign((bundle / "SHA256SUMS").read_bytes(), str(settings.signing_key)) != first
    publish_release(bundle, "mini", settings)
    assert path.read_bytes() == first


def test_a_release_that_stands_is_signed_later(settings: Publish, bundle: Path, tmp_path: Path):
    uri = publish_release(bundle, "mini", settings.model_copy(update={"signing_key": None}))
    with pytest.raises(UserError, match=r"is not signed, and publish\.verify_key asks for it; do not use it"):
        find_release(uri, settings)
    again = write_sealed(tmp_path / "again", card="other figures\n")
    with pytest.raises(UserError, match=r"is unsigned, and its SHA256SUMS .* is not that of this run"):
        publish_release(again, "mini", settings)
    publish_release(bundle, "mini", settings)
    assert verify_release(uri, settings).signature == "valid"


def test_the_signature_of_another_key_is_refused_by_readers_and_by_publishers(
    settings: Publish, bundle: Path, tmp_path: Path
):
    private, public = write_keys(tmp_path, "theirs", curve=ec.SECP384R1())
    theirs = settings.model_copy(update={"signing_key": private, "verify_key": public})
    uri = publish_release(bundle, "mini", theirs)
    assert verify_release(uri, theirs).signature == "valid"
    for refused in (
        lambda: find_release(uri, settings),
        lambda: download_release(uri, settings, tmp_path),
        lambda: verify_release(uri, settings),
    ):
        with pytest.raises(UserError, match=r"SHA256SUMS\.sig: is no signature of its SHA256SUMS by the key of .*ours"):
            refused()
    with pytest.raises(UserError, match=r"SHA256SUMS\.sig: is no signature .* by publish\.signing_key"):
        publish_release(bundle, "mini", settings)


def test_a_release_that_was_changed_with_its_checksums_and_manifest_is_refused(
    settings: Publish, bundle: Path, tmp_path: Path
):
    uri = publish_release(bundle, "mini", settings)
    folder = Path(settings.to) / PREFIX
    forged = write_sealed(tmp_path / "forged", card="trust me\n")
    forged_uri = publish_release(forged, "mini", Publish(to=str(tmp_path / "elsewhere")))
    for path in Path(forged_uri.removeprefix("file://")).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert verify_release(uri, settings.model_copy(update={"verify_key": None})).signature == "unchecked"
    with pytest.raises(UserError, match=r"SHA256SUMS\.sig: is no signature of its SHA256SUMS"):
        pull_release(uri, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1]", b'{"dsseEnvelope": {}}'])
def test_what_is_no_signature_at_all_is_refused(content: bytes, keys: tuple[str, str]):
    with pytest.raises(UserError, match="place: is no signature"):
        check(b"sums", content, keys[1], "place")


def test_a_signature_of_which_a_part_is_missing_is_refused(keys: tuple[str, str]):
    whole = json.loads(sign(b"sums", keys[0]))
    check(b"sums", json.dumps(whole).encode(), keys[1], "place")
    for part in whole:
        lacking = {name: value for name, value in whole.items() if name != part}
        if part != "mediaType":
            with pytest.raises(UserError, match="place: is no signature"):
                check(b"sums", json.dumps(lacking).encode(), keys[1], "place")
    whole["dsseEnvelope"]["signatures"] = []
    with pytest.raises(UserError, match="place: is no signature"):
        check(b"sums", json.dumps(whole).encode(), keys[1], "place")


def test_keys_that_cannot_be_used_are_named_and_never_quoted_and_nothing_is_published(
    settings: Publish, bundle: Path, tmp_path: Path
):
    ours, public = str(settings.signing_key), str(settings.verify_key)
    key = ec.generate_private_key(ec.SECP256R1())
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"MARKED-SECRET-1"),
        )
    )
    other = tmp_path / "ed25519.pem"
    other.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    marked = tmp_path / "text.pem"
    marked.write_text("-----BEGIN PRIVATE KEY-----\nMARKED-SECRET-1\n-----END PRIVATE KEY-----\n")
    unsupported, _ = write_keys(tmp_path, "k1", curve=ec.SECP256K1())
    for path in (encrypted, other, marked, unsupported, public, tmp_path / "none.pem"):
        with pytest.raises(UserError, match=rf"publish\.signing_key: {path}: .*expected a PEM file") as caught:
            publish_release(bundle, "mini", settings.model_copy(update={"signing_key": str(path)}))
        assert "MARKED-SECRET-1" not in str(caught.value) and "\n" not in str(caught.value)
    assert not Path(settings.to).exists()
    uri = publish_release(bundle, "mini", settings)
    for path in (ours, str(marked), str(tmp_path / "none.pub")):
        with pytest.raises(UserError, match=rf"publish\.verify_key: {path}: .*public key"):
            find_release(uri, settings.model_copy(update={"verify_key": path}))


def test_no_key_is_in_what_was_published(settings: Publish, bundle: Path):
    publish_release(bundle, "mini", settings)
    secret = "".join(Path(str(settings.signing_key)).read_text().splitlines()[1:-1])
    for path in Path(settings.to).rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"PRIVATE" not in content and secret[:40].encode() not in content
