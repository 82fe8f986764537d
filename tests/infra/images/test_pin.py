"""`make pin` asks a registry as a container engine would; here one of our own that answers as Docker Hub does."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from infra.checks.manifests import INFRA
from tests.doubles.http_server import Answer, serving

PYTHON, RAY = "library/python/manifests/3.11-slim-trixie", "rayproject/ray/manifests/2.60.0-py311-gpu"
DIGESTS = {PYTHON: "sha256:" + "a1" * 32, RAY: "sha256:" + "b2" * 32}
BOTH = f"PYTHON_DIGEST={DIGESTS[PYTHON]}\nRAY_DIGEST={DIGESTS[RAY]}\n"


@pytest.mark.parametrize(
    ("digests", "written", "said"),
    [
        (DIGESTS, BOTH, f"rayproject/ray:2.60.0-py311-gpu is {DIGESTS[RAY]}"),
        ({PYTHON: DIGESTS[PYTHON]}, "earlier\n", "did not say what rayproject/ray:2.60.0-py311-gpu is"),
        (dict.fromkeys(DIGESTS, "sha256:short"), "earlier\n", "'sha256:short'"),
    ],
)
def test_both_digests_are_written_as_build_arguments_or_the_file_is_left_alone(
    tmp_path: Path, digests: dict[str, str], written: str, said: str
) -> None:
    def handle(verb: str, path: str, query: Mapping[str, str], _: bytes, headers: Mapping[str, str]) -> Answer:
        """A token for a repository; a digest for who has the token and takes an index."""
        if verb == "GET":
            return 200, {"token": f"for-{query['scope']}"}
        asked = path.removeprefix("/v2/")
        scope = f"repository:{asked.partition('/manifests/')[0]}:pull"
        if headers.get("Authorization") != f"Bearer for-{scope}":
            return 401, None, {"WWW-Authenticate": f'Bearer realm="{url}/token",service="registry",scope="{scope}"'}
        if asked not in digests or "index.v1+json" not in headers["Accept"]:
            return 404, None
        return 200, None, {"Docker-Content-Digest": digests[asked]}

    output = tmp_path / "digests.env"
    output.write_text("earlier\n")
    with serving(handle) as url:
        command = [sys.executable, INFRA / "images/pin.py", "--registry", url, "--output", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (written != BOTH)
    assert said in done.stderr
    assert output.read_text() == written
