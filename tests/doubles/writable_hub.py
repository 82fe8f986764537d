"""A model hub that takes commits as the Hugging Face hub does (huggingface_hub 2.4, hf_api.py and _commit_api.py).

Small files come within a commit, weights by git-lfs before it. It refuses what the hub refuses: tokens that may not
write, a card whose base is no model's id, a commit of weights that nobody uploaded, a name or tag that is taken.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.doubles.http_server import Answer, serving

WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Repository:
    """What one repository holds."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class WritableHub:
    """A running hub."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)

    def answer(self, verb: str, path: str, _: Any, body: bytes, headers: Mapping[str, str]) -> Answer:
        """To one request."""
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):  # addresses that the batch signed
            self.uploaded[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token not in (WRITER, READER):
            return _refused(401, "Invalid credentials in Authorization header")
        if verb != "GET" and token == READER:
            return _refused(403, "You don't have the rights to write")
        if path == "/api/validate-yaml":
            base = re.search(r"^base_model: (.*)$", json.loads(body)["content"], flags=re.MULTILINE)
            wrong = base and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base[1])
            errors = [{"message": f'"base_model" with value "{base[1]}" is not valid.'}] if wrong else []
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = Repository(private=asked.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}"}
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w-]+)(?:\.git)?/?(.*)", path)
        if not found or found[1] not in self.repositories:
            return _refused(404, "Repository not found", "RepoNotFound")
        return self._of(found[1], found[2], body)

    def _of(self, name: str, rest: str, body: bytes) -> Answer:
        here = self.repositories[name]
        what = rest.partition("/")[0]
        if what in ("", "revision"):
            return 200, {"id": name, "private": here.private, "sha": (here.commits or ["0" * 40])[-1], "siblings": []}
        if what == "refs":
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in here.tags.items()]
            return 200, {"branches": [], "converts": [], "tags": tags}
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": each["path"], "uploadMode": _mode(each), "shouldIgnore": False} for each in files]
            return 200, {"files": modes}
        if what == "info":  # /info/lfs/objects/batch
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if what == "commit":
            return self._commit(name, here, [json.loads(line) for line in body.splitlines()])
        if what == "tag":
            tag = json.loads(body)["tag"]
            if tag in here.tags:
                return _refused(409, "Tag already exists")
            here.tags[tag] = rest.partition("/")[2]
            return 200, {}
        return _refused(404, f"no such endpoint: {rest}")

    def _commit(self, name: str, here: Repository, lines: list[dict[str, Any]]) -> Answer:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                here.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                weights = self.uploaded.get(value["oid"], b"")
                if hashlib.sha256(weights).hexdigest() != value["oid"] or len(weights) != value["size"]:
                    why = "because an LFS pointer pointed to a file that does not exist"
                    return _refused(400, f"Your push was rejected {why}")
                here.files[value["path"]] = weights
        oid = hashlib.sha1(f"{name} {len(here.commits)}".encode()).hexdigest()
        here.commits.append(oid)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}


def _mode(file: Mapping[str, Any]) -> str:
    return "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular"


def _refused(status: int, message: str, code: str = "") -> Answer:
    return status, {"error": message}, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@contextmanager
def running() -> Iterator[WritableHub]:
    """A hub without repositories."""
    hub = WritableHub()
    with serving(hub.answer) as hub.url:
        yield hub
