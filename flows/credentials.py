"""The secrets of `lcmlora up`: passwords, keys and certificates, in files that only their owner can read."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from lcmlora.errors import UserError
from lcmlora.io.files import sync_folder

# Nobody renews a certificate of one machine. It starts in the past, so that it is valid when the clock is wrong.
_VALID = (datetime(2020, 1, 1), datetime(2120, 1, 1))


@dataclass(frozen=True)
class Login:
    """A name and a password, as HTTP's basic authentication has them."""

    name: str
    password: str = field(repr=False)

    @property
    def pair(self) -> str:
        """`name:password`, which Prefect calls an auth string."""
        return f"{self.name}:{self.password}"


@dataclass(frozen=True)
class Certificate:
    """Files in PEM: a certificate for server and client alike, its key, and the authority that signed it."""

    authority: Path
    certificate: Path
    key: Path


def missing_password(api: str) -> UserError:
    """Returns the error for a Prefect server that has answered 401."""
    return UserError(
        f"the Prefect server at {api} asks for a password: `source .up/environment` sets that of `lcmlora up`; for "
        "another server set PREFECT_API_AUTH_STRING"
    )


def write_secret(path: Path, content: str) -> None:
    """Writes a file that nobody else can read, whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def certificate(folder: Path, host: str) -> Certificate:
    """Returns the folder's certificate for an IP address. It is made if it is missing.

    The authority's own key is not kept, so that it signs no other certificate.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    made = Certificate(folder / "authority.pem", folder / "certificate.pem", folder / "key.pem")
    if made.key.exists():  # the last of the files that is written
        return made

    def begin(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, "lcmlora authority")
        )
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        return builder.not_valid_before(_VALID[0]).not_valid_after(_VALID[1])

    root, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = begin("lcmlora authority", root).add_extension(x509.BasicConstraints(True, None), critical=True)
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    signed = begin("lcmlora", own).add_extension(uses, critical=False)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    signed = signed.add_extension(address, critical=False)
    for path, builder in ((made.authority, authority), (made.certificate, signed)):
        content = builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        write_secret(path, content.decode())
    private = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(made.key, private.decode())
    return made
