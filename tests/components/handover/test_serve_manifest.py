"""Manifests for servers: the layout is compared with how Ray Serve LLM's own loader finds an adapter."""

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jsonschema import Draft202012Validator

from components.config.methods import METHODS
from components.config.schema import MethodConfig
from components.handover import serve_manifest
from components.handover.serve_manifest import MANIFESTS, Served, Serving, beside, manifest, placed, served, serving
from components.registry import aliases, signing
from components.registry.versions import Version, resolve
from components.shared.errors import IntegrityError, UserError
from components.store.store import Store
from tests.components.handover.published import written
from tests.frozen import registry

FACTS = Served("icd", "v1", "s3://b/adapters/icd/versions/v1", "org/base", "abc", 16)


@pytest.mark.parametrize("base", ["org/base", "/srv/base", "s3://b/bases/one"])
def test_ray_serve_finds_a_version_by_its_folder_as_its_own_loader_joins_it(base: str) -> None:
    (application,) = manifest(dataclasses.replace(FACTS, base=base), "ray-serve")["applications"]
    (config,) = application["args"]["llm_configs"]
    source = Path(importlib.util.find_spec("ray").origin).parent / "llm/_internal/common/utils/lora_utils.py"
    names = {"get_base_model_id", "get_lora_id"}
    tree = ast.parse(source.read_text())
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in names]
    loader: dict[str, Any] = {}
    exec(compile(ast.Module(functions, []), str(source), "exec"), loader)  # ray's own, without its serving packages
    asked = f"{config['model_loading_config']['model_id']}:{FACTS.version}"
    assert loader["get_base_model_id"](asked) == base.removeprefix("s3://")
    assert config["model_loading_config"]["model_source"] == base
    # os.path.join(remote_path, lora_name) in download_lora_adapter
    assert f"{config['lora_config']['dynamic_lora_loading_path']}/{loader['get_lora_id'](asked)}" == FACTS.uri
    assert config["engine_kwargs"] == {"enable_lora": True, "max_lora_rank": 16, "max_loras": 16, "revision": "abc"}


def test_kserve_and_vllm_name_the_version_and_the_rank_that_they_must_allow() -> None:
    spec = manifest(FACTS, "kserve")["spec"]
    assert spec["model"]["lora"]["adapters"] == [{"name": "v1", "uri": FACTS.uri}]
    assert "template" not in spec
    large = manifest(Served("icd", "v1", FACTS.uri, "org/base", "", 256), "kserve")["spec"]
    assert large["template"]["containers"][0]["env"][0]["value"] == "--max-lora-rank=256"
    command = " ".join(manifest(FACTS, "vllm"))
    assert command.startswith("vllm serve org/base --revision abc --enable-lora --max-lora-rank 16")
    assert command.endswith("--lora-modules v1=./icd-v1")
    resolving = " ".join(manifest(FACTS, "vllm-resolver"))
    # vLLM asks its resolvers only where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set
    assert resolving == (
        "env FINELOOP_LORA_FOLDER=./icd VLLM_ALLOW_RUNTIME_LORA_UPDATING=true "
        "vllm serve org/base --revision abc --enable-lora --max-lora-rank 16"
    )


def test_where_keys_are_trusted_no_server_is_sent_to_what_none_of_them_signed(store: Store) -> None:
    version, key = written().published(store), Ed25519PrivateKey.generate()
    strict = Store(store._client, store.bucket, store.prefix, trusted_keys=[signing.public_text(key)])
    with pytest.raises(IntegrityError, match="signed by none"):
        served(strict, version)
    signing.sign(store, "icd", version.version, key, alias="production")
    facts = served(strict, version)
    assert facts.version == version.version
    # Its manifest leads to the folder of all versions, and the server loads any that a request names.
    with pytest.raises(UserError, match=r"registry\.trusted_keys is set: use --for vllm-resolver"):
        manifest(facts, "ray-serve")
    for server in ("kserve", "vllm", "vllm-resolver"):
        assert manifest(facts, server) == manifest(served(store, version), server)
    assert manifest(served(store, version), "ray-serve")


@pytest.mark.parametrize(("rank", "pattern", "allowed"), [(4, {}, 8), (24, {}, 32), (4, {"layers.0.mlp": 48}, 64)])
def test_the_rank_that_servers_must_allow_holds_that_of_the_adapters_own_config(
    store: Store, rank: int, pattern: dict[str, int], allowed: int
) -> None:
    made = written()
    version = dataclasses.replace(made, adapter={**made.adapter, "r": rank, "rank_pattern": pattern}).published(store)
    # Of vLLM's choices the smallest that holds it: vllm/config/lora.py, MaxLoRARanks.
    assert f"--max-lora-rank {allowed} " in " ".join(manifest(served(store, version), "vllm"))


def test_a_server_gets_the_base_that_the_adapter_stands_on_by_a_name_that_it_reads(store: Store) -> None:
    plain, own = (written(run_id=run_id, base="").published(store) for run_id in ("promoted", "held"))
    for version, base in ((plain, "given/base"), (own, "bases/6b23e4f55dbbd7fd/f95ac8bc76594715")):
        uri = f"s3://{registry.BUCKET}/{registry.PREFIX}/{base}"
        assert manifest(served(store, version), "kserve")["spec"]["model"]["uri"] == uri
        (application,) = manifest(served(store, version), "ray-serve")["applications"]
        assert application["args"]["llm_configs"][0]["model_loading_config"]["model_source"] == uri
        for server in ("vllm", "vllm-resolver"):
            with pytest.raises(UserError, match=rf"was trained on '{uri}', which --for {server} cannot fetch"):
                manifest(served(store, version), server)
            pulled = placed(served(store, version), server)
            assert pulled.is_pulled
            assert f"vllm serve ./icd-{version.version}-base --enable-lora" in " ".join(manifest(pulled, server))
    made = written(base="models/base")
    made.lineage["base"]["identity"] = {"kind": "folder", "sha256": "0"}
    here = served(store, made.published(store))
    assert manifest(here, "vllm")[2] == str(Path.cwd() / "models/base")
    with pytest.raises(UserError, match="--for kserve cannot fetch"):
        manifest(here, "kserve")


def test_a_packaged_base_is_served_from_the_folder_that_pull_writes_or_from_a_copy_that_is_named(store: Store) -> None:
    made = written(base="pkg://x/y.gguf")
    made.lineage["base"]["identity"] = {"kind": "package", "sha256": "0"}
    facts = served(store, made.published(store))
    assert facts.base_identity == {"kind": "package", "sha256": "0"}
    (pulled, base), own = manifest(placed(facts, "vllm"), "vllm")[1:3], f"./icd-{facts.version}"
    assert (pulled, base) == ("serve", f"{own}-base")
    assert manifest(placed(facts, "vllm"), "vllm")[-1] == f"{facts.version}={own}"
    for server in ("ray-serve", "kserve"):
        with pytest.raises(UserError, match="--with-base` writes it as a folder, and --base names where"):
            manifest(placed(facts, server), server)
    copied = placed(facts, "kserve", "s3://b/bases/x")
    assert manifest(copied, "kserve")["spec"]["model"]["uri"] == "s3://b/bases/x"
    with pytest.raises(UserError, match="'-x', which --for vllm cannot fetch"):
        manifest(placed(facts, "vllm", "-x"), "vllm")


@pytest.mark.parametrize(
    "base", ["--trust-remote-code", "org/--x", "pkg://x/y.gguf", "", "a b", "org/base\n--x", "../x"]
)
def test_a_name_that_a_server_could_take_for_anything_else_is_refused(store: Store, base: str) -> None:
    made = written()
    version = dataclasses.replace(made, adapter={**made.adapter, "base_model_name_or_path": base}).published(store)
    for server in MANIFESTS:
        with pytest.raises(UserError, match=r"was trained on '.*cannot fetch"):
            manifest(served(store, version), server)


def test_what_cannot_be_served_as_it_is_is_refused_with_the_way_out(store: Store) -> None:
    made = written()
    made.lineage["recipe"]["serving"] = {"servable_as": "merged", "notes": ["its magnitudes make it no LoRA"]}
    with pytest.raises(UserError, match=r"not served as it is .its magnitudes.*adapters export"):
        served(store, made.published(store))


@pytest.mark.parametrize(
    ("section", "value"), [("base", None), ("recipe", {}), ("base", {"identity": {"commit": "--x"}})]
)
def test_a_lineage_that_does_not_say_what_serving_takes_is_one_sentence(store: Store, section: str, value: Any) -> None:
    made = written()
    version = dataclasses.replace(made, lineage={**made.lineage, section: value}).published(store)
    with pytest.raises(IntegrityError, match="does not say how it is served"):
        served(store, version)


TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def of(name: str, *, targets: list[str] = TARGETS, **settings: object) -> Serving:
    method = MethodConfig.model_validate({"name": name, **settings})
    return serving(method.row, rank=method.r, target_modules=targets)


SERVABLE_AS = {**dict.fromkeys(("lora", "qlora", "rslora", "loftq"), "lora"), "vera": "lora-export"}
SERVABLE_AS |= dict.fromkeys(("dora", "qdora", "dvora"), "merged")


@pytest.mark.parametrize(("name", "servable_as"), SERVABLE_AS.items())
def test_every_method_says_how_it_is_served(name: str, servable_as: str) -> None:
    found = of(name)
    assert found.servable_as == servable_as
    assert found.notes
    assert set(METHODS) == SERVABLE_AS.keys()


@pytest.mark.parametrize(
    ("rank", "choice"), [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64), (65, 128), (257, 320), (512, 512), (513, None)]
)
def test_the_smallest_rank_of_vllm_that_holds_the_adapter_is_named(rank: int, choice: int | None) -> None:
    assert serve_manifest.max_lora_rank(rank) == choice
    note = "merged" if choice is None else f"--max-lora-rank {choice}"
    assert any(note in each for each in of("lora", rank=rank).notes)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("lora", {"rank": 513}, "rank 513 is above vLLM's largest --max-lora-rank, 512"),
        ("vera", {"rank": 513}, "rank 513 is above vLLM's largest --max-lora-rank, 512"),
        ("qlora", {"targets": [*TARGETS, "router", "conv"]}, "vLLM is not known to wrap conv, router"),
        ("qdora", {}, "its magnitudes make it no LoRA, and vLLM does not load DoRA"),
    ],
)
def test_what_vllm_does_not_load_is_merged_and_the_reason_named(name: str, settings: Any, reason: str) -> None:
    found = of(name, **settings)
    assert (found.servable_as, found.notes[0]) == ("merged", reason)


@pytest.mark.parametrize(
    ("name", "base", "word"),
    [
        ("lora", "nf4", "--quantization bitsandbytes"),
        ("vera", "nf4", "--quantization bitsandbytes"),
        ("lora", "int8", "int8 weights"),
        ("loftq", "nf4", "belongs to the base of its own that adapter_config.json names"),
    ],
)
def test_a_quantised_base_is_told(name: str, base: str, word: str) -> None:
    assert any(word in note for note in of(name, base=base).notes)
    assert not any(word in note for note in of("lora").notes)


def test_a_lineage_tells_the_kind() -> None:
    kept = {"servable_as": "lora-export", "notes": ["a"]}
    assert serve_manifest.recorded({"recipe": {"adapter": "vera", "serving": kept}}) == Serving("lora-export", ["a"])


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
    weights = {each["modelRewrite"]: each["weight"] for each in rule["targets"]}
    assert weights == {"icd.chapters@v2": 10, "icd.chapters@v1": 90}
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
    routes = [spec["router"]["route"] for spec in specs]
    assert [(each["group"], each["weight"]) for each in routes] == [("icd-chapters", 90), ("icd-chapters", 10)]
    # resolvedModelNames in KServe's router_group.go: members with other names get none of the group's requests.
    names = [{spec["model"]["name"], *(each["name"] for each in spec["model"]["lora"]["adapters"])} for spec in specs]
    assert names[0] == names[1]
    assert [spec["model"]["lora"]["adapters"][0]["uri"] for spec in specs] == [OLD.uri, NEW.uri]


@pytest.fixture
def versions(store: Store) -> list[Version]:
    """Three versions on one base, of which production held the first and holds the second."""
    made = written()
    bodies = ({"adapter_model.safetensors": bytes([number])} for number in range(3))
    found = [dataclasses.replace(made, files=files).published(store) for files in bodies]
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
