"""Validate a Kubernetes object strictly: a field that the API server would refuse or drop is an error, and so is a kind
that nobody here knows.

Built-in kinds are checked against Kubernetes' own schemas. Custom resources are checked against the projects' own
definitions, where FINELOOP_CRDS names a folder with them (`make crds`), and otherwise against the schemas beside this
file, which know the fields that Fineloop uses and no other; the Prometheus Operator's are always checked against those.
"""

import gzip
import json
import os
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry, Resource

from infra.checks.manifests import Loader, Manifest

KUBERNETES = "1.34"
VARIABLE = "FINELOOP_CRDS"
OWN = Path(__file__).with_name("definitions")
FETCHED_GROUPS = ("ray.io", "kueue.x-k8s.io")
CUSTOM_GROUPS = (*FETCHED_GROUPS, "monitoring.coreos.com")


def errors(manifest: Manifest, crds: Path | None = None) -> list[str]:
    """What is wrong with an object, each as "field: message"; empty when nothing is.

    Args:
        manifest: the object.
        crds: folder with the custom resource definitions; None takes the schemas beside this file.
    """
    api_version, kind = manifest["apiVersion"], manifest["kind"]
    group = api_version.partition("/")[0]
    if group not in CUSTOM_GROUPS:
        return _built_in_errors(manifest)
    validators = _crd_validators(crds) if crds and group in FETCHED_GROUPS else _own_validators()
    if (api_version, kind) not in validators:
        return [f"kind: {kind} is not a kind of {api_version} that is known here"]
    found = validators[api_version, kind].iter_errors(manifest)
    return [_line(error) for error in sorted(found, key=lambda error: list(map(str, error.absolute_path)))]


def crds_folder() -> Path | None:
    """The folder that FINELOOP_CRDS names, if it is set.

    Raises:
        NotADirectoryError: it names none.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    folder = Path(named)
    if not folder.is_dir():
        raise NotADirectoryError(f"{VARIABLE}={named} is no folder: run `make crds`, or unset it")
    return folder


def _built_in_errors(manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError as unknown:
        return [f"kind: {unknown.message}"]
    except kubernetes_validate.ValidationError as error:
        return [_line(error)]
    return []


def _line(error: ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path)) or 'object'}: {error.message}"


@cache
def _own_validators() -> dict[tuple[str, str], Draft202012Validator]:
    found = {}
    for path in sorted(OWN.glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        api_version = path.stem.replace("_", "/")
        for kind, definition in schema["$defs"].items():
            if "apiVersion" in definition["properties"]:
                whole = {"$schema": schema["$schema"], "$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}
                found[api_version, kind] = Draft202012Validator(whole, registry=_kubernetes())
    return found


@cache
def _kubernetes() -> Registry[Any]:
    """Kubernetes' own strict definitions, for what custom resources embed: pod templates, selectors, taints."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    text = (folder / "_definitions.json").read_text(encoding="utf-8")
    return Resource.from_contents(json.loads(text)) @ Registry()


@cache
def _crd_validators(folder: Path) -> dict[tuple[str, str], Draft202012Validator]:
    found = {}
    for definition in _definitions(folder):
        group, kind = definition["spec"]["group"], definition["spec"]["names"]["kind"]
        for version in definition["spec"]["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"] |= {name: {"type": "string"} for name in ("apiVersion", "kind")}
            schema["properties"]["metadata"] = {"type": "object"}  # the API server's own part
            found[f"{group}/{version['name']}", kind] = Draft202012Validator(schema)
    return found


def _definitions(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yaml.gz")]):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            documents = list(yaml.load_all(file, Loader=Loader))
        yield from (d for d in documents if d and d["kind"] == "CustomResourceDefinition")


def _strict(schema: Any) -> Any:
    """A structural schema as JSON Schema that refuses the fields which the API server would prune."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    keeps_unknown = strict.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in strict
    if strict.get("type") == "object" and isinstance(strict.get("properties"), dict) and not keeps_unknown:
        strict["additionalProperties"] = False
    if strict.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    if strict.get("nullable") is True and "type" in strict:
        strict["type"] = [strict["type"], "null"]
    return strict


def own_fields_that_are_unknown(crds: Path) -> Iterator[str]:
    """Fields that the schemas beside this file have and the definitions have not."""
    whole = _crd_validators(crds)
    for (api_version, kind), own in _own_validators().items():
        if api_version.partition("/")[0] not in FETCHED_GROUPS:
            continue
        if (api_version, kind) in whole:
            yield from _unknown(own.schema, whole[api_version, kind].schema, own.schema["$defs"], kind)
        else:
            yield f"{api_version} {kind}"


def _unknown(own: Any, whole: Any, definitions: dict[str, Any], where: str) -> Iterator[str]:
    if "$ref" in own:
        local = own["$ref"].removeprefix("#/$defs/")
        if local in definitions:  # else one of Kubernetes' own
            yield from _unknown(definitions[local], whole, definitions, where)
        return
    for name, inner in own.get("properties", {}).items():
        if name not in whole.get("properties", {}):
            yield f"{where}.{name}"
        elif name != "metadata":
            yield from _unknown(inner, whole["properties"][name], definitions, f"{where}.{name}")
    if "items" in own:
        yield from _unknown(own["items"], whole.get("items", {}), definitions, f"{where}[]")
