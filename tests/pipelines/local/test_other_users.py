"""What another user of this machine reaches of a home and of its S3 server.

The gRPC services are called as SeaweedFS's own administration shell calls them (weed/pb/filer.proto, filer_pb).
"""

import contextlib
import http.client
import json
import os
import pwd
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from components.shared.errors import UserError
from pipelines.local import ray_head, seaweedfs
from pipelines.local.seaweedfs import CERTIFICATE, KEY, write_certificate
from pipelines.local.server import LOOPBACK, Service, private_folder

ANSWERS_IN_S = 10
REFUSED = 999
CONFIGURATION = "/filer_pb.SeaweedFiler/GetFilerConfiguration"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user of the machine may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which takes root")
def test_nobody_else_reads_or_writes_anything_below_a_home_or_of_ray(open_folder, monkeypatch):
    """Were it not for the folders: every file in them is open to all."""
    home = open_folder / "home"
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    ray = ray_head._short_temp_dir()  # below it Ray opens its own folder to everybody
    for folder in (Service("store", "", home).path("x").parent, private_folder(home / "runs"), ray):
        (folder / "inside").mkdir(mode=0o777)
        (folder / "inside" / "records.dat").write_bytes(b"training data")
        (folder / "inside" / "records.dat").chmod(0o666)
    seen = open_folder / "seen"
    seen.write_text("the control: what is not private is reached")
    nobody = pwd.getpwnam("nobody")
    # Not this Python, which may itself lie where nobody else can go. `find` asks access(2).
    command = f"find {open_folder} -type f ( -readable -o -writable ) -print -o -type d -writable -print"
    own: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    done = subprocess.run(command.split(), cwd="/", capture_output=True, text=True, check=False, **own)
    assert done.stdout.split() == [str(seen)]


def test_a_folder_from_before_is_closed_and_one_that_was_there_already_above_it_is_left_alone(tmp_path):
    shared = tmp_path / "shared"
    (shared / "store").mkdir(parents=True)
    for folder in (shared, shared / "store"):
        folder.chmod(0o755)
    assert private_folder(shared / "store").stat().st_mode & 0o777 == 0o700
    assert shared.stat().st_mode & 0o777 == 0o755
    assert private_folder(tmp_path / "home" / "store").parent.stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for home, why in ((tmp_path / "file", "Not a directory"), (Path("/proc/home"), "No such file or directory")):
        with pytest.raises(UserError, match=rf"{home}/runs cannot be written \({why}\): --home takes"):
            private_folder(home / "runs")


@pytest.fixture
def s3_directory(s3_home: Path) -> Path:
    return s3_home / "store"


def test_the_services_of_the_store_answer_its_own_certificate_and_nobody_else(s3_server, s3_directory, tmp_path):
    others = {service: f"127.0.0.1:{port}" for service, port in _ports(s3_directory, grpc=True).items()}
    filer = others.pop("filer")  # the one that `_asked` can ask
    assert _asked(filer, _with_certificate(s3_directory)) == grpc.StatusCode.OK
    write_certificate(tmp_path)
    authority = (s3_directory / CERTIFICATE).read_bytes()
    for address in (filer, *others.values()):
        assert _asked(address, None) == grpc.StatusCode.UNAVAILABLE
        assert _asked(address, grpc.ssl_channel_credentials(authority)) == grpc.StatusCode.UNAVAILABLE
        assert _asked(address, _with_certificate(tmp_path, authority)) == grpc.StatusCode.UNAVAILABLE


def test_the_store_takes_and_tells_nothing_over_http_without_its_certificate(s3_server, s3_directory):
    """A blob that another user writes could take the place of the next one, and stop the owner's publications."""
    found = _ports(s3_directory)
    own, none = ssl.create_default_context(cafile=s3_directory / CERTIFICATE), ssl.create_default_context()
    own.load_cert_chain(s3_directory / CERTIFICATE, s3_directory / KEY)
    none.check_hostname, none.verify_mode = False, ssl.CERT_NONE
    assert _status(http.client.HTTPSConnection(LOOPBACK, found["volume"], context=own), "GET", "/status") == 200
    for service, port in found.items():
        gets = (("GET", path) for path in ("/", "/status", "/metrics", "/ui/index.html"))
        for verb, path in (("POST", "/1,0100deadbeef"), *gets):
            if (service, path) != ("s3", "/status"):  # which says nothing
                plain = _status(http.client.HTTPConnection(LOOPBACK, port, timeout=ANSWERS_IN_S), verb, path)
                assert plain >= 400, (service, verb, path)
                by_tls = http.client.HTTPSConnection(LOOPBACK, port, timeout=ANSWERS_IN_S, context=none)
                assert _status(by_tls, verb, path) == REFUSED, (service, verb, path)


def _status(connection: http.client.HTTPConnection, verb: str, path: str) -> int:
    """The status that it answers, or `REFUSED` where the connection comes to nothing."""
    with contextlib.closing(connection):
        try:
            connection.request(verb, path, b"junk" if verb == "POST" else None)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return REFUSED


def _ports(directory: Path, *, grpc: bool = False) -> dict[str, int]:
    """Each service's port for HTTP, or for gRPC."""
    ports, number = json.loads((directory / "ports.json").read_text()), len(seaweedfs.SERVICES)
    return dict(zip(seaweedfs.SERVICES, ports[number:] if grpc else ports[:number], strict=True))


def _with_certificate(directory: Path, authority: bytes | None = None) -> grpc.ChannelCredentials:
    certificate = (directory / CERTIFICATE).read_bytes()
    return grpc.ssl_channel_credentials(authority or certificate, (directory / KEY).read_bytes(), certificate)


def _asked(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    opened = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with opened as channel:
        try:
            channel.unary_unary(CONFIGURATION)(b"", timeout=ANSWERS_IN_S)
        except grpc.RpcError as refused:
            return refused.code()
    return grpc.StatusCode.OK
