"""A double of Kubeflow's Model Registry: what `components/handover/announce.py` asks of its REST API.

It takes the fields that the schemas of kubeflow/hub's api/openapi/model-registry.yaml name and no others, and refuses a
second thing of one name, as the server does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.doubles.http_server import Answer

API = "/api/model_registry"
RESOURCE = {"name", "description", "externalId", "customProperties"}
FIELDS = {
    "registered_model": RESOURCE | {"owner", "state"},
    "model_version": RESOURCE | {"author", "state", "registeredModelId"},
    "artifact": RESOURCE | {"artifactType", "uri", "state", "modelFormatName", "modelFormatVersion"},
}
VALUES = {"MetadataStringValue": ("string_value", str), "MetadataDoubleValue": ("double_value", (int, float))}


class ModelRegistry:
    """Its `handle` answers a request; `token` is what each must bear, `versions` are the API's that it serves."""

    def __init__(self, token: str = "", versions: Sequence[str] = ("v1", "v1alpha3")) -> None:
        self._token = token
        self._versions = versions
        self._kept: list[dict[str, Any]] = []

    def handle(self, verb: str, path: str, query: Mapping[str, str], body: bytes, headers: Mapping[str, str]) -> Answer:
        if self._token and headers.get("Authorization") != f"Bearer {self._token}":
            return 401, {"code": "401", "message": "Unauthorized"}
        given = json.loads(body) if body else {}
        version, _, rest = path.removeprefix(f"{API}/").partition("/")
        if version not in self._versions:
            return 404, {"code": "404", "message": "404 page not found"}
        asked = f"/{rest}"
        if (verb, asked) == ("GET", "/registered_models"):
            found = [each["value"] for each in self._kept if each["kind"] == "registered_model"]
            return 200, {"items": found[:1], "size": len(found[:1]), "pageSize": 1, "nextPageToken": ""}
        if verb == "GET" and asked in ("/registered_model", "/model_version"):
            return self._find(asked[1:], query["name"], query.get("parentResourceId", ""))
        if verb == "POST" and asked in ("/registered_models", "/model_versions"):
            return self._create(asked[1:-1], given, given.get("registeredModelId", ""))
        if match := re.fullmatch(r"/model_versions/(\d+)/artifacts", asked):
            if verb == "POST":
                return self._create("artifact", given, match[1])
            found = [each for each in self._kept if (each["kind"], each["parent"]) == ("artifact", match[1])]
            return 200, {"items": [each["value"] for each in found], "size": len(found)}
        if verb == "PATCH" and (match := re.fullmatch(r"/registered_models/(\d+)", asked)):
            return self._update(match[1], given)
        return 404, {"code": "404", "message": f"no {verb} {path}"}

    def _find(self, kind: str, name: str, parent: str) -> Answer:
        for each in self._kept:
            if (each["kind"], each["parent"], each["value"]["name"]) == (kind, parent, name):
                return 200, each["value"]
        return 404, {"code": "404", "message": f"no {kind} found for name={name}"}

    def _create(self, kind: str, given: dict[str, Any], parent: str) -> Answer:
        if refused := self._refused(given, FIELDS[kind]):
            return refused
        if self._find(kind, given["name"], parent)[0] == 200:
            return 409, {"code": "409", "message": f"{kind} {given['name']} already exists"}
        value = {**given, "id": str(len(self._kept) + 1)}
        self._kept.append({"kind": kind, "parent": parent, "value": value})
        return 201, value

    def _update(self, number: str, given: dict[str, Any]) -> Answer:
        if refused := self._refused({"name": "", **given}, FIELDS["registered_model"]):
            return refused
        value = self._kept[int(number) - 1]["value"]
        value.update(given)
        return 200, value

    @staticmethod
    def _refused(given: dict[str, Any], fields: set[str]) -> Answer | None:
        wrong = [key for key in given if key not in fields] + [key for key in ("name",) if key not in given]
        for name, value in given.get("customProperties", {}).items():
            key, kind = VALUES[value["metadataType"]]
            if value.keys() != {"metadataType", key} or not isinstance(value[key], kind):
                wrong.append(name)
        return (400, {"code": "400", "message": f"wrong: {wrong}"}) if wrong else None
