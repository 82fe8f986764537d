"""Keeps a home private to its owner on a shared machine: folder modes, and a certificate for the store.

A folder that only its owner may enter protects everything in it, whatever the modes of its files. It does not protect
TCP ports: the servers behind them require this certificate, a key or a token.
"""

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from components.shared.errors import UserError
from pipelines.local.ports import LOOPBACK

OWNER_ONLY = 0o700
UMASK = 0o077
CERTIFICATE, KEY = "grpc.crt", "grpc.key"
VALID_FOR = timedelta(days=3650)
CLOCK_SKEW = timedelta(days=1)


def private_folder(path: Path) -> Path:
    """Create the folder if it is missing, close it to all users but its owner, and return it.

    Raises:
        UserError: it cannot be created or written.
    """
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
        if path.stat().st_mode & 0o777 != OWNER_ONLY:
            path.chmod(OWNER_ONLY)
        if not os.access(path, os.W_OK):
            raise PermissionError("it is not yours, or its file system is read-only")
    except OSError as exc:
        reason = exc.strerror or exc
        raise UserError(f"{path} cannot be written ({reason}): --home takes a folder of your own") from exc
    return path


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """Write a new self-signed certificate and its key; whoever can read the key may use the server.

    Both ends of the connections belong to the same server and share the certificate, which names the address that they
    compare.
    """
    from cryptography import x509  # not at the top: `fineloop --help` imports this module's neighbours
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fineloop")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOOPBACK))]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = directory / CERTIFICATE, directory / KEY
    key_path.unlink(missing_ok=True)
    key_path.touch(mode=0o600)
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate_path, key_path
