"""What the cluster's driver and launcher can resolve of a pipeline; kfp.local resolves more.

As kubeflow/pipelines 2.17.0 has it under backend/src/v2, and 2.16.0 and 2.16.1 too: driver/resolve.go:389-567 for
parameters and artifacts, compiler/argocompiler/dag.go:338-342 and driver/dag.go:84 for conditions, which no
importer may have, and component/importer_launcher.go:206-240 for an importer's URI.
"""

import re
from collections.abc import Iterator
from typing import Any

_CONDITION_INPUT = re.compile(r"inputs\.parameter_values\['([^']+)'\]")
_KINDS = ("componentInput", "taskOutput", "runtimeValue", "taskFinalStatus")


def unresolved(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each task that would fail on a cluster for what it is given, and why."""
    components = spec.get("components", {})
    for dag in (spec["root"], *(each for each in components.values() if "dag" in each)):
        for name, task in dag["dag"]["tasks"].items():
            executor = components[task["componentRef"]["name"]].get("executorLabel")
            importer = spec.get("deploymentSpec", {}).get("executors", {}).get(executor, {}).get("importer")
            yield from ((name, why) for why in (*_conditions(task, importer), *_inputs(task, dag, importer)))


def _conditions(task: dict[str, Any], importer: dict[str, Any] | None) -> Iterator[str]:
    condition = task.get("triggerPolicy", {}).get("condition", "")
    if condition and importer:
        yield "triggerPolicy.condition on importer task is not supported"
    for name in _CONDITION_INPUT.findall(condition):
        if name not in task.get("inputs", {}).get("parameters", {}):
            yield f"no such key: {name}"


def _inputs(task: dict[str, Any], dag: dict[str, Any], importer: dict[str, Any] | None) -> Iterator[str]:
    given = task.get("inputs", {})
    uri = (importer or {}).get("artifactUri", {}).get("runtimeParameter")
    for name, source in given.get("parameters", {}).items():
        if name == uri:
            yield from _uri(source, dag)
        else:
            yield from _source(name, source, dag, "Parameter")
    for name, source in given.get("artifacts", {}).items():
        yield from _source(name, source, dag, "Artifact")
    if uri and uri not in given.get("parameters", {}):
        yield f"cannot find parameter {uri} in task input to fetch artifact uri"


def _uri(source: dict[str, Any], dag: dict[str, Any]) -> Iterator[str]:
    # A source of another kind has none of these: the launcher then looks for the empty name.
    name = source.get("componentInputParameter", "")
    if name not in _defined(dag, "Parameter"):
        yield f"error resolving artifact URI: parent DAG does not have input parameter {name}"


def _source(name: str, source: dict[str, Any], dag: dict[str, Any], what: str) -> Iterator[str]:
    """`what` is Parameter or Artifact."""
    (kind,) = (key for key in source if key.startswith(_KINDS))
    value = source[kind]
    if kind == f"componentInput{what}":
        if value not in _defined(dag, what):
            yield f"parent DAG does not have input {what.lower()} {value}"
    elif kind == f"taskOutput{what}":
        if value["producerTask"] not in dag["dag"]["tasks"]:
            yield f'unknown producer task "{value["producerTask"]}" in DAG'
    elif not (kind == "runtimeValue" and "constant" in value) and kind != "taskFinalStatus":
        yield f"the spec of {name} is of a kind that is not implemented: {kind}"


def _defined(dag: dict[str, Any], what: str) -> dict[str, Any]:
    return dag.get("inputDefinitions", {}).get(f"{what.lower()}s", {})
