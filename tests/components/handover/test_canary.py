"""Two versions that share requests: manifests against the routers' own definitions, in the fields that they use."""

import dataclasses
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from components.handover.serve_manifest import Served, beside, manifest, served
from components.registry import aliases
from components.registry.versions import Version, resolve
from components.shared.errors import UserError
from components.store.store import Store
from tests.components.handover.published import written

NEW = Served("icd.chapters", "v2", "s3://b/adapters/icd.chapters/versions/v2", "org/base", "abc", 16)
OLD = dataclasses.replace(NEW, version="v1", uri="s3://b/adapters/icd.chapters/versions/v1")


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object without other fields: the API server would drop them."""
    about = {"properties": properties, "required": required.split(), "additionalProperties": False}
    return {"type": "object", **about}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


TEXT = {"type": "string", "minLength": 1}
DNS = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
METADATA = closed("name", name={**DNS, "maxLength": 253})
REWRITE = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "inference.networking.x-k8s.io/v1alpha2"},
    kind={"const": "InferenceModelRewrite"},
    metadata=METADATA,
    spec=closed(
        "poolRef rules",
        poolRef=closed(
            "name",
            group={"type": "string", "pattern": r"^$|^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"},
            kind={"type": "string", "pattern": "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"},
            name={**TEXT, "maxLength": 253},
        ),
        rules=listed(
            closed(
                matches=listed(closed("model", model=closed("value", type={"enum": ["Exact"]}, value=TEXT))),
                targets=listed(
                    closed(
                        "modelRewrite",
                        modelRewrite=TEXT,
                        weight={"type": "integer", "minimum": 1, "maximum": 1_000_000},
                    )
                ),
            )
        ),
    ),
)
"""llm-d/llm-d-inference-scheduler at 520af47896e5, config/crd/bases/*_inferencemodelrewrites.yaml."""
SERVICE = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "serving.kserve.io/v1alpha1"},
    kind={"const": "LLMInferenceService"},
    metadata=METADATA,
    spec=closed(
        "model",
        model=closed("uri", uri=TEXT, name=TEXT, lora=closed(adapters=listed(closed("name uri", name=TEXT, uri=TEXT)))),
        router=closed(
            gateway=closed(),
            scheduler=closed(),
            route=closed(
                http=closed(),
                group={"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", "maxLength": 63},
                weight={"type": "integer", "minimum": 0, "maximum": 1_000_000},
            ),
        ),
    ),
)
"""kserve/kserve v0.20.0, pkg/apis/serving/v1alpha1/llm_inference_service_types.go; an adapter has to have a name."""


def test_llm_d_answers_requests_for_the_adapter_by_versions_in_the_resolvers_names() -> None:
    made = manifest(NEW, "llm-d", share=10, rest=OLD)
    Draft202012Validator(REWRITE).validate(made)
    assert made["spec"]["poolRef"]["name"] == made["metadata"]["name"] == "icd-chapters"
    (rule,) = made["spec"]["rules"]
    assert rule["matches"] == [{"model": {"value": "icd.chapters"}}]
    assert {each["modelRewrite"]: each["weight"] for each in rule["targets"]} == {
        "icd.chapters@v2": 10,
        "icd.chapters@v1": 90,
    }
    alone = manifest(NEW, "llm-d")
    Draft202012Validator(REWRITE).validate(alone)
    assert [each["modelRewrite"] for each in alone["spec"]["rules"][0]["targets"]] == ["icd.chapters@v2"]


def test_kserve_gets_two_services_of_one_group_whose_models_have_the_same_names() -> None:
    made = manifest(NEW, "kserve", share=10, rest=OLD)
    assert (made["kind"], len(made["items"])) == ("List", 2)
    for service in made["items"]:
        Draft202012Validator(SERVICE).validate(service)
    specs = [service["spec"] for service in made["items"]]
    assert [service["metadata"]["name"] for service in made["items"]] == ["icd-chapters-v1", "icd-chapters-v2"]
    assert [(spec["router"]["route"]["group"], spec["router"]["route"]["weight"]) for spec in specs] == [
        ("icd-chapters", 90),
        ("icd-chapters", 10),
    ]
    # resolvedModelNames in KServe's router_group.go: members with other names get none of the group's requests.
    names = [{spec["model"]["name"], *(each["name"] for each in spec["model"]["lora"]["adapters"])} for spec in specs]
    assert names[0] == names[1]
    assert [spec["model"]["lora"]["adapters"][0]["uri"] for spec in specs] == [OLD.uri, NEW.uri]


@pytest.fixture
def versions(store: Store) -> list[Version]:
    """Three versions on one base, of which production held the first and holds the second."""
    made = written()
    found = [
        dataclasses.replace(made, files={"adapter_model.safetensors": bytes([number])}).published(store)
        for number in range(3)
    ]
    for version in found[:2]:
        aliases.promote(store, "icd", version.version)
    return found


def test_the_other_requests_go_to_production_or_to_what_it_held_before(store: Store, versions: list[Version]) -> None:
    first, second, third = versions
    assert beside(store, served(store, third), "llm-d", 99).version == second.version
    assert beside(store, served(store, second), "kserve", 1).version == first.version
    assert beside(store, served(store, resolve(store, "icd")), "llm-d", 10).version == first.version


@pytest.mark.parametrize(
    ("server", "share", "words"),
    [
        ("ray-serve", 10, "--share is for a router, --for kserve or llm-d; Ray Serve LLM has no weights"),
        ("vllm", 10, "--share is for a router"),
        ("llm-d", 0, "--share 0: a share of the requests in per cent, from 1 to 99"),
        ("llm-d", 100, "--share 100: "),
    ],
)
def test_an_impossible_share_is_refused(
    store: Store, versions: list[Version], server: Any, share: int, words: str
) -> None:
    with pytest.raises(UserError) as refused:
        beside(store, served(store, versions[1]), server, share)
    assert str(refused.value).startswith(words)


def test_a_version_without_another_and_two_on_different_bases_share_nothing(store: Store) -> None:
    alone = written().published(store)
    with pytest.raises(UserError, match="production of icd has held none but"):
        beside(store, served(store, alone), "llm-d", 10)
    aliases.promote(store, "icd", alone.version)
    with pytest.raises(UserError, match="production of icd has held none but"):
        beside(store, served(store, alone), "llm-d", 10)
    other = written(base="org/other").published(store)
    with pytest.raises(UserError, match=r"stands on org/other, and \w+ on org/base; a router shares out"):
        beside(store, served(store, other), "llm-d", 10)
