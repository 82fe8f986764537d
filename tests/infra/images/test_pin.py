"""`make pin` asks a registry as a container engine would; here one of our own that answers as Docker Hub does."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "infra" / "images"
PYTHON, RAY = "sha256:" + "a1" * 32, "sha256:" + "b2" * 32


@dataclass
class Registry:
    url: str = ""
    digests: dict[str, str] = field(
        default_factory=lambda: {
            "/v2/library/python/manifests/3.11-slim-trixie": PYTHON,
            "/v2/rayproject/ray/manifests/2.60.0-py311-gpu": RAY,
        }
    )


@pytest.fixture
def registry() -> Iterator[Registry]:
    found = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            repository = self.path.removeprefix("/v2/").partition("/manifests/")[0]
            scope = f"repository:{repository}:pull"
            if self.headers.get("Authorization") != f"Bearer for {scope}":
                challenge = f'Bearer realm="{found.url}/token",service="registry",scope="{scope}"'
                self.answer(401, {"WWW-Authenticate": challenge})
            elif self.path not in found.digests or "index.v1+json" not in self.headers["Accept"]:
                self.answer(404, {})
            else:
                self.answer(200, {"Docker-Content-Digest": found.digests[self.path]})

        def do_GET(self) -> None:
            scope = re.search(r"scope=repository%3A(.*?)%2F(.*?)%3Apull", self.path)
            assert scope
            self.answer(200, {}, f'{{"token": "for repository:{scope[1]}/{scope[2]}:pull"}}'.encode())

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def pin(registry: Registry, output: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, IMAGES / "pin.py", "--registry", registry.url, "--output", output]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_digests_of_both_base_images_are_written_as_build_arguments(registry: Registry, tmp_path: Path) -> None:
    done = pin(registry, tmp_path / "digests.env")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digests.env").read_text() == f"PYTHON_DIGEST={PYTHON}\nRAY_DIGEST={RAY}\n"
    assert f"rayproject/ray:2.60.0-py311-gpu is {RAY}" in done.stderr


def test_a_tag_that_does_not_exist_leaves_the_file_alone(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "digests.env").write_text("PYTHON_DIGEST=earlier\n")
    registry.digests.popitem()
    done = pin(registry, tmp_path / "digests.env")
    assert done.returncode == 1
    assert "did not say what rayproject/ray:2.60.0-py311-gpu is" in done.stderr
    assert (tmp_path / "digests.env").read_text() == "PYTHON_DIGEST=earlier\n"


def test_an_answer_that_is_no_digest_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.digests = dict.fromkeys(registry.digests, "sha256:short")
    done = pin(registry, tmp_path / "digests.env")
    assert done.returncode == 1
    assert "'sha256:short'" in done.stderr
    assert not (tmp_path / "digests.env").exists()


def test_digests_that_are_committed_are_those_of_the_dockerfiles() -> None:
    digests = IMAGES / "digests.env"
    if not digests.exists():
        pytest.skip("infra/images/digests.env is not there: `make pin` writes it where a registry can be reached")
    wanted = {
        name
        for path in IMAGES.glob("*.Dockerfile")
        for name in re.findall(r"^ARG (\w+_DIGEST)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    lines = digests.read_text(encoding="utf-8").splitlines()
    assert {line.partition("=")[0] for line in lines} == wanted
    assert [line for line in lines if not re.fullmatch(r"\w+=sha256:[0-9a-f]{64}", line)] == []
