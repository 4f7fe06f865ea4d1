"""Signatures by your own key: of records, and of a release's SHA256SUMS, which lists the SHA-256 of every other file.

`openssl ecparam -name prime256v1 -genkey -noout -out private.pem` makes a key, `openssl ec -in private.pem -pubout -out
public.pem` its public half. A signature is a Sigstore bundle, which the `model_signing` command reads as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from lcmlora import extras
from lcmlora.errors import UserError
from lcmlora.io.files import temporary_folder
from lcmlora.io.parsing import Malformed, parse_json
from lcmlora.releases.bundle import CHECKSUMS

SIGNATURE = f"{CHECKSUMS}.sig"


def sign(content: bytes, key: str, name: str = CHECKSUMS) -> bytes:
    """Returns a signature of the content of a SHA256SUMS or of a record. ECDSA signatures differ from call to call.

    Args:
        key: the PEM file of a private key.
        name: the kind of content. It is signed as well, so that a signature of one kind does not fit another.

    Raises:
        UserError: the key cannot be used, or model-signing is not installed.
    """
    with _laid_out(content, b"", name) as (folder, signature):
        _signer(key).sign(folder, signature)
        return signature.read_bytes()


def check(content: bytes, signature: bytes, key: str, place: str, name: str = CHECKSUMS) -> None:
    """Raises UserError where the signature is not that of this SHA256SUMS by this key, or the key cannot be used.

    Args:
        key: the PEM file of a public key.
        place: of the signature, for messages.
        name: as for `sign`.
    """
    _require("publish.verify_key")
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(key))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unusable("publish.verify_key", key, "public", error) from None
    refused = UserError(
        f"{place}: is no signature of its {name} by the key of {key}; do not use this release before you know who "
        "wrote it"
    )
    try:
        bundle = parse_json(signature)
    except Malformed:
        raise refused from None
    # model-signing prints warnings about old bundles to standard output, which belongs to the command's own output.
    with _laid_out(content, json.dumps(bundle).encode(), name) as (folder, path), redirect_stdout(sys.stderr):
        try:
            verifier.verify(folder, path)
        # Others may have written the bundle: anything in it may be missing or of another type.
        except (InvalidSignature, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise refused from None


def check_own(content: bytes, signature: bytes, key: str, place: str, name: str = CHECKSUMS) -> None:
    """As `check`, with the PEM file of the private key.

    Raises:
        UserError: as `check`.
    """
    _signer(key)
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with temporary_folder() as folder:
        public = Path(folder, "public.pem")
        public.write_bytes(pem)
        try:
            check(content, signature, str(public), place, name)
        except UserError:
            raise UserError(
                f"{place}: is no signature of its {name} by publish.signing_key; another key or another "
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
    # Only the operating system's reason is shown: other messages may quote the file's content.
    reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else "is not one"
    return UserError(
        f"{setting}: {key}: {reason}; expected a PEM file with the {kind} key of an elliptic curve (P-256, P-384 or "
        "P-521), without a password"
    )


def _require(setting: str) -> None:
    extras.require("model_signing", "OpenSSL", extra="signing", needed_by=setting)


@contextmanager
def _laid_out(content: bytes, signature: bytes, name: str) -> Iterator[tuple[Path, Path]]:
    """Yields a folder with the content alone, and the signature's file: model-signing signs whole folders."""
    with temporary_folder() as root:
        folder, path = Path(root, "release"), Path(root, SIGNATURE)
        folder.mkdir()
        (folder / name).write_bytes(content)
        path.write_bytes(signature)
        yield folder, path
