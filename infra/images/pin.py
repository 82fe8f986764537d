"""Look up the digests of the base images that the Dockerfiles name, from their registry: `make pin`.

Needs no container engine. What it writes is a file of build arguments, to be committed: `NAME=sha256:...`, a line for
each `FROM <registry>/<repository>:<tag>@${NAME}`.
"""

import argparse
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
TIMEOUT_S = 30
# An image for several platforms is an index; its digest stands for all of them.
ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
# docker.io is a name; its registry answers elsewhere.
ENDPOINTS = {"docker.io": "https://registry-1.docker.io"}
_FROM = re.compile(r"^FROM (?P<registry>[^/\s]+)/(?P<repository>[^:\s]+):(?P<tag>[^@\s]+)@\$\{(?P<name>\w+)\}", re.M)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


def base_images(dockerfiles: list[Path]) -> Iterator[re.Match[str]]:
    """The base image of each Dockerfile: registry, repository, tag and name of the build argument."""
    for path in dockerfiles:
        found = list(_FROM.finditer(path.read_text(encoding="utf-8")))
        if not found:
            raise SystemExit(f"{path} has no FROM <registry>/<repository>:<tag>@${{NAME}}: give it one")
        yield from found


def digest_of(endpoint: str, repository: str, tag: str) -> str:
    """What the registry says the tag stands for now."""
    url = f"{endpoint}/v2/{repository}/manifests/{tag}"
    headers = {"Accept": ACCEPT}
    try:
        answer = _head(url, headers)
    except urllib.error.HTTPError as exc:
        if exc.code != 401:
            raise
        token = _token(exc.headers.get("WWW-Authenticate", ""))
        answer = _head(url, {**headers, "Authorization": f"Bearer {token}"})
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", answer):
        raise SystemExit(f"{url} answered with the digest {answer!r}, not with sha256: and 64 hex digits")
    return answer


def _head(url: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, headers=headers, method="HEAD")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return str(response.headers.get("Docker-Content-Digest", ""))


def _token(challenge: str) -> str:
    """An anonymous token to pull, from where a registry's 401 says that they are given out."""
    asked = dict(_CHALLENGE.findall(challenge))
    if "realm" not in asked:
        raise SystemExit(f"the registry wants a login that is no bearer token: {challenge!r}")
    query = urllib.parse.urlencode({key: asked[key] for key in ("service", "scope") if key in asked})
    with urllib.request.urlopen(f"{asked['realm']}?{query}", timeout=TIMEOUT_S) as response:
        return str(json.load(response)["token"])


def main(arguments: list[str] | None = None) -> None:
    """Write the digests, or end with one message and leave the file as it was."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER / "digests.env", help="file of build arguments to write")
    parser.add_argument("--registry", default="", help="ask this URL, such as a mirror's, instead of each image's own")
    parser.add_argument("dockerfiles", nargs="*", type=Path, default=sorted(FOLDER.glob("*.Dockerfile")))
    options = parser.parse_args(arguments)
    lines = []
    for image in base_images(options.dockerfiles):
        endpoint = options.registry or ENDPOINTS.get(image["registry"], f"https://{image['registry']}")
        try:
            digest = digest_of(endpoint.rstrip("/"), image["repository"], image["tag"])
        except (OSError, KeyError, ValueError) as exc:
            raise SystemExit(f"{endpoint} did not say what {image['repository']}:{image['tag']} is: {exc}") from exc
        lines.append(f"{image['name']}={digest}\n")
        sys.stderr.write(f"{image['repository']}:{image['tag']} is {digest}\n")
    options.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
