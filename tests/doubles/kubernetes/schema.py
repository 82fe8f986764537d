"""What a RayJob may hold: KubeRay's own CRD where FINELOOP_CRDS names a folder of them, else the fields that we use."""

import copy
import functools
import gzip
import os
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRD = "ray.io_rayjobs.yaml.gz"


def crd_path() -> Path | None:
    """KubeRay's CRD, where there is one."""
    folder = os.environ.get("FINELOOP_CRDS", "")
    path = Path(folder) / CRD
    return path if folder and path.is_file() else None


def problems(body: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """(field, what is wrong with it) of each wrong value, and the path of each unknown field."""
    wrong, unknown = [], []
    for error in _validator().iter_errors(body):
        path = ".".join(map(str, error.absolute_path))
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            unknown += [f"{path}.{key}".lstrip(".") for key in error.instance if key not in known]
        else:
            wrong.append((path, error.message[:200]))
    return wrong, unknown


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    path = crd_path()
    found = _of_crd(path) if path else _OURS
    found["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": "RayJob"}}
    found["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(found)


def _of_crd(path: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with gzip.open(path) as file:
        crd = yaml.load(file, Loader=loader)
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    return _strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))


def _strict(found: Any) -> Any:
    """As the API server reads a structural schema: nothing but what it names."""
    if isinstance(found, list):
        return [_strict(item) for item in found]
    if not isinstance(found, dict):
        return found
    found = {key: _strict(value) for key, value in found.items()}
    is_closed = "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields")
    if found.get("type") == "object" and is_closed:
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _COUNT, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"},
}
_CONTAINER = _object(
    "name",
    name=_TEXT,
    image=_TEXT,
    env=_list(_object("name", name=_TEXT, value=_TEXT)),
    envFrom=_list(
        _object(configMapRef=_object(name=_TEXT, optional=_FLAG), secretRef=_object(name=_TEXT, optional=_FLAG))
    ),
    ports=_list(_object("containerPort", name=_TEXT, containerPort=_COUNT)),
    resources=_object(requests=_QUANTITIES, limits=_QUANTITIES),
    securityContext=_object(
        allowPrivilegeEscalation=_FLAG, readOnlyRootFilesystem=_FLAG, capabilities=_object(drop=_list(_TEXT))
    ),
    volumeMounts=_list(_object("name", "mountPath", name=_TEXT, mountPath=_TEXT)),
)
_POD = _object(
    metadata=_object(labels=_TEXTS, annotations=_TEXTS),
    spec=_object(
        "containers",
        serviceAccountName=_TEXT,
        automountServiceAccountToken=_FLAG,
        enableServiceLinks=_FLAG,
        securityContext=_object(
            runAsNonRoot=_FLAG,
            runAsUser=_COUNT,
            runAsGroup=_COUNT,
            fsGroup=_COUNT,
            seccompProfile=_object("type", type=_TEXT),
        ),
        imagePullSecrets=_list(_object(name=_TEXT)),
        containers=_list(_CONTAINER),
        volumes=_list(_object("name", name=_TEXT, emptyDir=_object(medium=_TEXT, sizeLimit=_TEXT))),
        nodeSelector=_TEXTS,
        tolerations=_list(_object(key=_TEXT, operator=_TEXT, value=_TEXT, effect=_TEXT)),
        restartPolicy=_TEXT,
        shareProcessNamespace=_FLAG,
        terminationGracePeriodSeconds=_COUNT,
    ),
)
_OURS = _object(
    spec=_object(
        entrypoint=_TEXT,
        jobId=_TEXT,
        metadata=_TEXTS,
        submissionMode=_TEXT,
        submitterPodTemplate=_POD,
        submitterConfig=_object(backoffLimit=_COUNT),
        shutdownAfterJobFinishes=_FLAG,
        suspend=_FLAG,
        ttlSecondsAfterFinished=_COUNT,
        activeDeadlineSeconds=_COUNT,
        preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit=_COUNT,
        rayClusterSpec=_object(
            "headGroupSpec",
            rayVersion=_TEXT,
            authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=_TEXT),
            enableInTreeAutoscaling=_FLAG,
            headGroupSpec=_object("template", rayStartParams=_TEXTS, template=_POD),
            workerGroupSpecs=_list(
                _object(
                    *("groupName", "minReplicas", "maxReplicas", "template"),
                    groupName=_TEXT,
                    replicas=_COUNT,
                    minReplicas=_COUNT,
                    maxReplicas=_COUNT,
                    rayStartParams=_TEXTS,
                    template=_POD,
                )
            ),
        ),
    ),
    status={"type": "object"},
)
