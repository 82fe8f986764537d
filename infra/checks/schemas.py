"""Validate a Kubernetes object strictly: a field that the API server would refuse or drop is an error, and so is an
unknown kind.

Built-in kinds are checked against Kubernetes' own schemas. Custom resources are checked against their projects' own
definitions, where FINELOOP_CRDS names a folder with them: `make crds` fetches those.
"""

import gzip
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from infra.checks.manifests import Loader, Manifest

KUBERNETES = "1.34"
VARIABLE = "FINELOOP_CRDS"
HOW = f"`make crds` fetches them and prints what to set {VARIABLE} to"
CUSTOM_GROUPS = ("ray.io", "kueue.x-k8s.io", "monitoring.coreos.com")


def errors(manifest: Manifest, crds: Path | None) -> list[str]:
    """The errors of an object, each as "field: message"; empty if there are none, or if it is not checked.

    Args:
        manifest: the object.
        crds: the folder with the custom resource definitions, if there is one.
    """
    if _group(manifest) not in CUSTOM_GROUPS:
        return _built_in_errors(manifest)
    if not is_checked(manifest, crds):
        return []
    api_version, kind = manifest["apiVersion"], manifest["kind"]
    validator = _validators(crds).get((api_version, kind))
    if validator is None:
        return [f"kind: {kind} is not a kind of {api_version} that is known here"]
    found = validator.iter_errors(manifest)
    return [_line(error) for error in sorted(found, key=lambda error: list(map(str, error.absolute_path)))]


def is_checked(manifest: Manifest, crds: Path | None) -> bool:
    """Whether the definitions of an object's group are at hand; those of built-in kinds always are."""
    group = _group(manifest)
    return group not in CUSTOM_GROUPS or any(version.startswith(f"{group}/") for version, _ in _validators(crds))


def crds_folder() -> Path | None:
    """The folder that FINELOOP_CRDS names, if it is set.

    Raises:
        NotADirectoryError: it names no folder.
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


def _group(manifest: Manifest) -> str:
    group: str = manifest["apiVersion"].partition("/")[0]
    return group


@cache
def _validators(folder: Path | None) -> dict[tuple[str, str], Draft202012Validator]:
    found = {}
    for definition in definitions(folder) if folder else ():
        group, kind = definition["spec"]["group"], definition["spec"]["names"]["kind"]
        for version in definition["spec"]["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"] |= {name: {"type": "string"} for name in ("apiVersion", "kind")}
            schema["properties"]["metadata"] = {"type": "object"}  # the API server's own part
            found[f"{group}/{version['name']}", kind] = Draft202012Validator(schema)
    return found


def definitions(folder: Path) -> Iterator[dict[str, Any]]:
    """All custom resource definitions of a folder, compressed or not."""
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
