"""What the API server checks of a pipeline and of a run's parameters before it accepts them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from infra.checks.manifests import Loader
from tests.doubles.kfp_server.errors import invalid

NUMBERS = ("NUMBER_INTEGER", "NUMBER_DOUBLE")
KINDS = {"STRING": str, "BOOLEAN": bool, "LIST": list, "STRUCT": dict, **dict.fromkeys(NUMBERS, (int, float))}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that was accepted: its name, the document as it came, and the parts of it."""

    name: str
    document: dict[str, Any]
    spec: dict[str, Any]
    platform: dict[str, Any] | None

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        return self.spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})

    def as_yaml(self) -> str:
        return yaml.safe_dump_all([self.spec, *([self.platform] if self.platform else [])], sort_keys=False)


def parse_package(text: str) -> Pipeline:
    """Read an uploaded file: the spec, and its platform's part as a second document."""
    try:
        documents = list(yaml.load_all(text, Loader=Loader))
    except yaml.YAMLError as exc:
        raise invalid(f"the package is not YAML: {exc}") from exc
    if len(documents) > 1:
        return parse_pipeline({"pipeline_spec": documents[0], "platform_spec": documents[1]})
    return parse_pipeline(documents[0])


def parse_pipeline(document: Any) -> Pipeline:
    """Check a pipeline against the messages that the server would parse it into; unknown fields are refused."""
    if not isinstance(document, dict):
        raise invalid("unknown template format: pipeline spec is invalid")
    platform = document.get("platform_spec")
    spec = document.get("pipeline_spec", document)
    message = pipeline_spec_pb2.PipelineSpec()
    try:
        json_format.ParseDict(spec, message)
        if platform:
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as exc:
        raise invalid(f"invalid v2 pipeline spec: {exc}") from exc
    if message.schema_version != "2.1.0":
        raise invalid(f"KFP only supports schema version 2.1.0, but the pipeline spec has {message.schema_version!r}")
    if not message.pipeline_info.name:
        raise invalid("invalid v2 pipeline spec: name is empty")
    return Pipeline(message.pipeline_info.name, document, spec, platform)


def check_parameters(pipeline: Pipeline, given: Mapping[str, Any]) -> None:
    """Kinds and literals of what is given, then what is missing, then what nobody asked for."""
    for name, defined in pipeline.parameters.items():
        kind = defined["parameterType"]
        if name not in given:
            if not defined.get("isOptional") and "defaultValue" not in defined:
                lacking = "is not optional, yet has neither default value nor user provided value"
                raise invalid(f"parameter {name} {lacking}")
            continue
        value = given[name]
        if not isinstance(value, KINDS[kind]) or (kind != "BOOLEAN" and isinstance(value, bool)):
            wanted, is_not = ("double or integer", "number") if kind in NUMBERS else (kind.lower(), kind.lower())
            why = f"requires type {wanted}, but the input parameter is not of {is_not} value type"
            raise invalid(f"input parameter {name} {why}")
        if defined.get("literals") and value not in defined["literals"]:
            raise invalid(f"input parameter {name} has value {value!r}, which is not one of {defined['literals']}")
    if extra := sorted(set(given) - set(pipeline.parameters)):
        raise invalid(f"parameter(s) provided are not required by pipeline: {', '.join(extra)}")


def check_fields(model: str, body: Mapping[str, Any]) -> None:
    """The gateway refuses JSON fields that the message does not have."""
    known = set(getattr(kfp_server_api, model).attribute_map.values())
    if unknown := sorted(set(body) - known):
        raise invalid(f'proto: unknown field "{unknown[0]}"')
