"""A model hub on loopback that serves one repository from a folder, and remembers which files it was asked for.

It answers what `huggingface_hub` asks about a model or a data set: the listing, and each file with its headers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.doubles import http_server
from tests.doubles.http_server import Answer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Hub:
    """A running hub."""

    url: str = ""
    commit: str = COMMIT
    """The commit that the default branch points at; all commits have the same files."""
    sent: set[str] = field(default_factory=set)
    """Files whose bytes were asked for."""
    asked: list[str] = field(default_factory=list)
    """Paths of all requests."""
    refusals: list[int] = field(default_factory=list)
    """Statuses that the next requests about the repository are refused with."""


@contextmanager
def serving(name: str, folder: Path, kind: str = "models") -> Iterator[Hub]:
    """Serve `folder` as the repository `name`, of models or datasets."""
    hub, about = Hub(), f"/api/{kind}/{name}"

    def answer(verb: str, path: str, _query: Any, _body: bytes, _headers: Mapping[str, str]) -> Answer:
        hub.asked.append(path)
        if hub.refusals and path.startswith(about):
            return hub.refusals.pop(0), ""
        files = {each.relative_to(folder).as_posix(): each for each in folder.rglob("*") if each.is_file()}
        file = path.partition("/resolve/")[2].partition("/")[2]
        asked_for = next((each for each in (COMMIT, LATER) if each in path), hub.commit)
        headers = {"ETag": f'"{file or "listing"}"', "X-Repo-Commit": asked_for}
        if path.startswith(f"{about}/tree/"):
            tree = [{"type": "file", "path": n, "size": files[n].stat().st_size, "oid": n} for n in sorted(files)]
            return 200, tree, headers
        if path.startswith(about) and "convert" not in path:
            siblings = [{"rfilename": n, "size": each.stat().st_size, "blobId": n} for n, each in files.items()]
            return 200, {"id": name, "sha": asked_for, "siblings": siblings}, headers
        if file not in files:
            return 404, ""
        if verb == "GET":
            hub.sent.add(file)
        return 200, files[file].read_bytes(), headers

    with http_server.serving(answer) as hub.url:
        yield hub
