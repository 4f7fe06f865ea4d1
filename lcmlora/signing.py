"""Signatures of releases by a key of one's own: of SHA256SUMS, which lists the digest of every other file.

`openssl ecparam -name prime256v1 -genkey -noout -out private.pem` makes a key, `openssl ec -in private.pem -pubout -out
public.pem` its public half. A signature is a Sigstore bundle, which the `model_signing` command reads as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.release import CHECKSUMS

SIGNATURE = f"{CHECKSUMS}.sig"


def sign(checksums: bytes, key: str) -> bytes:
    """Returns a signature of the content of a SHA256SUMS; every call returns another one, as ECDSA does.

    Args:
        key: the PEM file of a private key.

    Raises:
        UserError: the key cannot be used, or model-signing is not installed.
    """
    with _laid_out(checksums, b"") as (folder, signature):
        _signer(key).sign(folder, signature)
        return signature.read_bytes()


def check(checksums: bytes, signature: bytes, key: str, place: str) -> None:
    """Raises UserError where the signature is not that of this SHA256SUMS by this key, or the key cannot be used.

    Args:
        key: the PEM file of a public key.
        place: what messages say of where the signature lies.
    """
    _require("publish.verify_key")
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(key))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unusable("publish.verify_key", key, "public", error) from None
    with _laid_out(checksums, signature) as (folder, path):
        try:
            verifier.verify(folder, path)
        # What is read was written by others: anything may be missing in it.
        except (InvalidSignature, ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise UserError(
                f"{place}: is no signature of its {CHECKSUMS} by the key of {key}; do not use this release before "
                "you know who wrote it"
            ) from None


def check_own(checksums: bytes, signature: bytes, key: str, place: str) -> None:
    """Does what `check` does, given the PEM file of the private key.

    Raises:
        UserError: as `check`.
    """
    _signer(key)
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder, "public.pem")
        public.write_bytes(pem)
        try:
            check(checksums, signature, str(public), place)
        except UserError:
            raise UserError(
                f"{place}: is no signature of its {CHECKSUMS} by publish.signing_key; another key or another "
                "hand left it there: find out whose, delete it, and run again"
            ) from None


def _signer(key: str):  # type: ignore[no-untyped-def]  # model_signing.signing.Config, of an extra
    _require("publish.signing_key")
    from model_signing import signing

    try:
        return signing.Config().use_elliptic_key_signer(private_key=Path(key))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unusable("publish.signing_key", key, "private", error) from None


def _unusable(setting: str, key: str, kind: str, error: Exception) -> UserError:
    # Of the reason only what the operating system says: others may quote the file.
    reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else "is not one"
    return UserError(
        f"{setting}: {key}: {reason}; expected a PEM file with the {kind} key of an elliptic curve (P-256, P-384 or "
        "P-521), without a password"
    )


def _require(setting: str) -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError:
        raise UserError(f"{setting}: needs model-signing; install it with `pip install lcmlora[signing]`") from None


@contextmanager
def _laid_out(checksums: bytes, signature: bytes) -> Iterator[tuple[Path, Path]]:
    """Yields a folder with SHA256SUMS alone, and the file of the signature: model-signing works on whole folders."""
    with tempfile.TemporaryDirectory() as root:
        folder, path = Path(root, "release"), Path(root, SIGNATURE)
        folder.mkdir()
        (folder / CHECKSUMS).write_bytes(checksums)
        path.write_bytes(signature)
        yield folder, path
